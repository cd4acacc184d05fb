"""The trainer: exact resume, what it reports, what it refuses."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mara_fast import DecodingConfig, MaraAgent
from mara_train import MaraConfig, MaraTrainer, TrainingDivergedError
from mara_train import checkpoint as checkpoint_module
from mara_train.checkpoint import checkpoints
from mara_train.report import read_metrics
from mara_train.rollout import Episode
from tiny_run import harmful, helpful, trainer

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("step_time_s", "episodes_per_s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder).wait(timeout=240)
    assert (folder / "agent").is_dir()
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "train", "tests"))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/tiny_run.py"), str(folder), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common: all but times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".pt"):
            found[name] = path.read_bytes()
    rows = read_metrics(folder)
    found["metrics"] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return found


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("at a checkpoint", marks=pytest.mark.slow),
        pytest.param("between", marks=pytest.mark.slow),
        "while writing",
    ],
)
def test_a_killed_run_goes_on_exactly(when: str, whole: Path, tmp_path: Path) -> None:
    marks = {
        "at a checkpoint": "checkpoint-2",
        "between": "checkpoint-4",
        "while writing": ".partial-checkpoint-4",
    }
    process = start(tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / marks[when]).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if when == "between":
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "agent").exists()
    assert start(tmp_path, "--resume").wait(timeout=240) == 0
    mine, theirs = contents(tmp_path), contents(whole)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == value, name


def test_what_a_run_leaves(whole: Path) -> None:
    assert [path.name for path in checkpoints(whole)] == ["checkpoint-4", "checkpoint-6"]
    agent = MaraAgent.from_pretrained(whole / "agent")
    assert agent.decoding == DecodingConfig(fallback="first")
    assert agent.config.base_model == "tiny"
    last = MaraAgent.from_pretrained(whole / "checkpoint-6/agent")
    assert torch.equal(agent.linear1.weight, last.linear1.weight)
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["num_episodes"] == 60
    for name in ("reward", "rewards/helpful/mean", "rewards/harmful/mean", "kl", "entropy"):
        assert math.isfinite(rows[-1][name])
    assert {"completions/mean_length", "accept/rank0_frac", "accept/all_rejected_frac"} < set(
        rows[0]
    )
    assert {"sac/alpha", "sac/q_gap", "eval/preference_vs_greedy"} < set(rows[-1])
    assert "sac/alpha" not in rows[0] and "eval/reward" not in rows[0]
    samples = [json.loads(x) for x in (whole / "completions.jsonl").read_text().splitlines()]
    assert samples[0].keys() == {"step", "prompt", "completion", "helpful", "harmful"}


def test_an_earlier_run_is_not_overwritten(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run: resume it"):
        trainer(whole).train()
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sac": {"gamma": 0.4}},
            r"what differs: sac.gamma \(0.5 there, 0.4 here\)$",
        ),
        ({"seed": 1}, r"what differs: seed \(0 there, 1 here\)"),
        ({"rewards": [helpful], "reward_weights": None}, "rewards .* reward_weights"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    options: dict[str, Any], message: str, whole: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(whole, **options).train(resume_from_checkpoint=True)


SCHEDULES = {"learning_rate_schedule": "linear", "final_target_entropy": 0.01}


def test_schedules_end_where_the_run_does(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_steps=4, **SCHEDULES)
    run.train()
    rates = [run.sac.optimizers[name].param_groups[0]["lr"] for name in ("actor", "alpha")]
    # The last of six steps.
    assert rates == pytest.approx([1e-3 / 6, 1e-2])
    first = run.args.sac.target_entropy
    assert float(run.sac.target_entropy) == pytest.approx(first + (0.01 - first) * 5 / 6)

    again = trainer(tmp_path / "again", save_steps=4, **SCHEDULES)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    for name, tensor in run.agent.state_dict().items():
        assert torch.equal(tensor, again.agent.state_dict()[name]), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduled_run_cannot_be_prolonged(name: str, tmp_path: Path) -> None:
    options = {name: SCHEDULES[name], "save_steps": 1, "num_episodes": 20}
    trainer(tmp_path, **options).train()
    longer = trainer(tmp_path, **(options | {"num_episodes": 30}))
    with pytest.raises(ValueError, match=r"what differs: num_episodes \(20 there, 30 here\)"):
        longer.train(resume_from_checkpoint=True)


def test_a_finished_run_can_be_prolonged(whole: Path, tmp_path: Path) -> None:
    long = trainer(tmp_path, num_episodes=80)
    metrics = long.train(resume_from_checkpoint=whole / "checkpoint-6")
    assert metrics["num_episodes"] == 80 and long.step == 8


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint to resume from"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: it has no trainer_state\.json"):
        trainer(tmp_path).train(resume_from_checkpoint=tmp_path)


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    def explode(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        explode.calls += 1  # type: ignore[attr-defined]
        scale = 1e12 if explode.calls > 4 else 1.0  # type: ignore[attr-defined]
        return [scale * len(text) for text in completions]

    explode.calls = 0  # type: ignore[attr-defined]
    run = trainer(tmp_path, rewards=[explode], reward_weights=None, reward_scaling="none")
    with pytest.raises(TrainingDivergedError, match=r"step 5 diverged.*critic_loss.*checkpoint-4"):
        run.train()
    assert checkpoints(tmp_path)[-1].name == "checkpoint-4"
    kept = MaraAgent.from_pretrained(tmp_path / "checkpoint-4/agent")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_callbacks_are_called_and_can_stop(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **others):  # type: ignore[no-untyped-def]
            seen.append(f"step {state.global_step} of {state.max_steps}")
            control.should_training_stop = state.global_step == 3
            return control

        def on_log(self, args, state, control, logs=None, **others):  # type: ignore[no-untyped-def]
            seen.append(f"log {logs['num_episodes']}")

        def on_save(self, args, state, control, **others):  # type: ignore[no-untyped-def]
            seen.append("save")

        def on_train_end(self, args, state, control, **others):  # type: ignore[no-untyped-def]
            seen.append("end")

    trainer(tmp_path, callbacks=[Watch()]).train()
    assert seen == [
        "step 1 of 6",
        "log 10",
        "step 2 of 6",
        "log 20",
        "save",
        "step 3 of 6",
        "log 30",
        "end",
    ]


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "greedy"])
def test_baselines(baseline: str, tmp_path: Path) -> None:
    """What the replay holds is the reward less its baseline."""
    run = trainer(
        tmp_path,
        rewards=[helpful],
        reward_weights=[2.0],
        reward_baseline=baseline,
        reward_scaling="none",
        reward_offset=0.25,
        reward_scale=3.0,
        token_rewards={"kl_weight": 0.0},
    )
    prompts: list[str] = []
    episodes: list[Episode] = []
    collect = run.collector.collect

    def watched(given: list[str], sequence_ids: list[int]) -> list[Episode]:
        prompts.extend(given)
        episodes.extend(collect(given, sequence_ids))
        return episodes

    run.collector.collect = watched  # type: ignore[method-assign]
    _, metrics = run._collect()
    total = 2 * torch.tensor(helpful(prompts, [e.generation.text for e in episodes]))
    wanted: Any = 0.0
    if baseline == "batch_mean":
        wanted = total.mean()
    if baseline == "greedy":
        answers = run.base.generate(prompts, max_new_tokens=32)
        wanted = 2 * torch.tensor(helpful(prompts, [answer.text for answer in answers]))
    expected = 3.0 * (total - wanted - 0.25)
    lengths = torch.tensor([len(episode.chain.actions) for episode in episodes])
    stored = run.replay.rewards[: len(run.replay)]
    torch.testing.assert_close(stored, expected.repeat_interleave(lengths).float())
    assert metrics["reward"] == pytest.approx(float(total.mean()))


def test_rewards_of_different_scales_count_the_same(tmp_path: Path) -> None:
    def large(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1000 * value for value in harmful(prompts, completions)]

    scales = []
    for index, second in enumerate((harmful, large)):
        run = trainer(tmp_path / str(index), rewards=[helpful, second])
        run._collect()
        scales.append((run.objective.scales, run.replay.rewards.clone()))
    assert scales[1][0][1] == pytest.approx(1000 * scales[0][0][1])
    torch.testing.assert_close(scales[0][1], scales[1][1], rtol=1e-4, atol=1e-5)


def test_a_reward_without_opinion_is_left_out(tmp_path: Path) -> None:
    def sometimes(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if index % 2 else 1.0 for index in range(len(prompts))]

    run = trainer(tmp_path, rewards=[helpful, sometimes], reward_scaling="none")
    _, metrics = run._collect()
    assert metrics["rewards/sometimes/mean"] == 1.0 and math.isfinite(metrics["reward"])


def test_what_is_wrong_is_said_before_any_work(tmp_path: Path) -> None:
    config = MaraConfig(output_dir=str(tmp_path / "run"))
    for arguments, message in (
        ({"train_dataset": []}, "train_dataset has no rows"),
        ({"train_dataset": ["a"], "reward_funcs": []}, "funcs is empty"),
        ({"train_dataset": ["a"], "args": {"seed": 1}}, "args must be a MaraConfig, got dict"),
        (
            {"train_dataset": ["a"], "args": dataclasses.replace(config, eval_steps=5)},
            "eval_steps is given, and no eval_dataset",
        ),
        (
            {"train_dataset": ["a"], "agent": MaraAgent(64, 32)},
            "the agent judges states of 64, the model's have 128",
        ),
        (
            {"train_dataset": ["a"], "args": config.replace(replay={"capacity": 10**12})},
            "takes .* GB; memory has",
        ),
    ):
        given = {"model": "tiny", "reward_funcs": [helpful], "args": config} | arguments
        with pytest.raises(ValueError, match=message):
            MaraTrainer(given.pop("model"), given.pop("reward_funcs"), given.pop("args"), **given)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint_module.write(tmp_path, 3, fail, keep=2)
    assert checkpoints(tmp_path) == []
