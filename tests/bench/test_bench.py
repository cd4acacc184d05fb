"""``mara-fast bench``: systems that decode what they should, figures, targets, mistakes."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mara_fast import DecodingStats
from mara_fast.bench import facts, measure, report, targets
from mara_fast.bench.cli import app
from mara_fast.bench.model import SHAPES, calibrate, random_llama
from mara_fast.bench.run import BenchConfig
from mara_fast.bench.systems import CASCADE, OUR_PLAIN, OURS, SYSTEMS, TRANSFORMERS

NANO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 500,
}
OPTIONS = (
    *("--model", "nano", "--batch-sizes", "1,3", "--input-len", "9", "--output-len", "6"),
    *("--num-iters", "1", "--num-prompts", "3", "--device", "cpu"),
)


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "nano", NANO)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})


def ratio_of(batch: dict[str, Any], first: str, second: str) -> float:
    """Median of the ratios of each round."""
    rounds = [batch["tokens_per_s"][name]["rounds"] for name in (first, second)]
    return statistics.median(a / b for a, b in zip(*rounds, strict=True))


def test_a_ratio_is_of_a_round() -> None:
    """A machine that is slow for a while is slow for both."""
    stats = DecodingStats(num_tokens=2, num_decided=1, num_forced=1, num_examined=2)
    rates = {OURS: [8.0, 4.0, 2.0, 6.0, 9.0], OUR_PLAIN: [10.0, 5.0, 2.5, 7.0, 20.0]}
    batch = report.batch_report(
        4,
        rates=rates,
        tokens={},
        stats=stats,
        limits={"plain_tokens_per_s": 14.0},
        parts={},
    )
    assert batch["ratios"][targets.PLAIN] == 0.8
    assert batch["ratios"][targets.ROOFLINE] == 0.5


def test_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(*OPTIONS, "--targets", "--output-json", str(tmp_path / "new/bench.json"))
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "new/bench.json").read_text())
    assert (tmp_path / "new/bench.png").stat().st_size > 10_000
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    assert found["hardware"].endswith("float32") and found["command"] and found["date"]
    for batch in found["batches"]:
        assert set(batch["tokens_per_s"]) == set(SYSTEMS) - {"plain, transformers static + compile"}
        assert set(batch["equal_answers_frac"].values()) == {1.0}
        assert sum(batch["time_by_part"].values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in batch["time_by_part"].values())
        rates = {name: rate["median"] for name, rate in batch["tokens_per_s"].items()}
        assert batch["ratios"]["MARA / plain, ours"] == ratio_of(batch, OURS, OUR_PLAIN)
        assert batch["ratios"]["plain, ours / roofline"] == (
            rates[OUR_PLAIN] / batch["roofline"]["plain_tokens_per_s"]
        )
        profile = batch["profile"]
        assert batch["ratios"][targets.LIMIT] == 1 / profile["candidates_per_token"] < 1
    one, *_ = found["targets"]
    assert one["name"] == targets.PLAIN and one["met"] is (one["measured"] >= one["wanted"])
    assert {t["met"] for t in found["targets"] if t["batch_size"] == 16} == {None}
    assert "not measured" in result.output and "batch 3" in result.output


def test_systems_by_number(tmp_path: Path) -> None:
    listed = run("--list-systems").output.splitlines()
    assert listed[0] == f"1  {OURS}" and len(listed) == len(SYSTEMS)
    path = tmp_path / "b.json"
    result = run(*OPTIONS, "--systems", "1,3", "--output-json", str(path))
    assert result.exit_code == 0, result.output
    batch = json.loads(path.read_text())["batches"][0]
    assert set(batch["tokens_per_s"]) == {OURS, TRANSFORMERS}
    assert "plain, ours / roofline" not in batch["ratios"]


def test_a_real_model(tmp_path: Path) -> None:
    from mara_fast import tiny

    path = tmp_path / "b.json"
    options = ("--agent", str(tiny.AGENT_PATH), "--systems", "1,2,5", "--batch-sizes", "2")
    result = run("--model", str(tiny.LM_PATH), *OPTIONS[4:], *options, "--output-json", str(path))
    assert result.exit_code == 0, (result.output, result.exception)
    batch = json.loads(path.read_text())["batches"][0]
    assert set(batch["tokens_per_s"]) == {OURS, OUR_PLAIN, CASCADE}
    assert batch["equal_answers_frac"] == {f"{OURS} = {CASCADE}": 1.0}


def test_a_file_of_options_and_printed_figures(tmp_path: Path) -> None:
    from mara_fast import tiny

    prompts = tmp_path / "prompts.jsonl"
    asked = ["how do i bake bread?", "What is it?", "tell me how to sing a song in the rain"]
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    options = {
        "model": str(tiny.LM_PATH),
        "agent": str(tiny.AGENT_PATH),
        "aligner": str(tiny.LM_PATH),
        "dataset_path": str(prompts),
        "batch_sizes": [1, 3],
        "num_prompts": 3,
        "num_serial_prompts": 3,
        "output_len": 4,
        "num_iters": 1,
        "paper": {CASCADE: 31.41, "Aligner, transformers": 20.63},
        "notes": ["The setting is not described."],
    }
    spec, path = tmp_path / "speed.yaml", tmp_path / "b.json"
    spec.write_text(json.dumps(options))
    # What is given goes before what the file says.
    result = run("-c", str(spec), "--batch-sizes", "2", "--output-json", str(path))
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(path.read_text())
    [batch] = found["batches"]
    assert batch["batch_size"] == 2 and found["options"]["batch_sizes"] == "2"
    assert found["options"]["output_len"] == 4 and found["paper"] == options["paper"]
    # Prompts of unequal length: padding changes nobody's tokens.
    assert set(batch["equal_answers_frac"].values()) == {1.0}
    ratio = ratio_of(batch, CASCADE, "Aligner, transformers")
    assert batch["ratios"]["authors' cascade / Aligner, transformers"] == ratio
    assert "the paper's ratios: authors' cascade / Aligner, transformers 1.52" in result.output
    assert "31.41" in result.output and "The setting is not described." in result.output
    refused = run("-c", str(spec), "--num-prompts", "4")
    assert refused.exit_code == 2 and "has 3 prompts, and 4 are needed" in refused.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping of options to values, got [1]"),
        ("modle: x", "unknown option 'modle'; did you mean 'model'?"),
        ("paper: {mara: 3}", "paper names 'mara', which is no system; there are MARA, ours"),
        ("paper: {'MARA, ours': fast}", "paper.MARA, ours='fast' is not allowed; allowed: tokens"),
        ("paper: {'MARA, ours': 0}", "paper.MARA, ours=0 is not allowed"),
        ("paper: 3", "paper must be a mapping of systems to numbers, got 3"),
        ("num_iters: many", "Invalid value for '--num-iters'"),
        ("num_iters: 0", "Invalid value for '--num-iters'"),
        ("batch_sizes: [0]", "batch_sizes='0' is not allowed"),
        ("model: [", "spec.yaml"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    result = run("-c", str(tmp_path / "spec.yaml"))
    assert result.exit_code == 2 and message in result.output, (result.output, result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", "no-such.yaml"), "no file at no-such.yaml"),
        (("--dataset-path", "x"), "--dataset-path goes with a real model, and 50m is a random"),
        (("--model", "9b"), "model='9b' is no shape (50m, llama-3.2-1b"),
        (("--agent", "x"), "--agent goes with a real model, and 50m is a random shape"),
        (("--aligner", "x"), "aligner='x' is not known; allowed beside a random model: 50m"),
        (("--batch-sizes", "0"), "batch_sizes='0' is not allowed; allowed: integers >= 1, as 1,16"),
        (("--batch-sizes", "1,,2"), "batch_sizes='1,,2' is not allowed"),
        (("--systems", "2,9"), "systems='2,9' is not allowed; allowed: from 1 to 7"),
        (("--systems", "2"), "systems='2' leaves MARA, ours (1) out"),
        (("--dtype", "int8"), "dtype='int8' is not known"),
        (("--device", "abacus"), "device='abacus' is not known"),
        (("--output-json", "/dev/null/x.json"), "/dev/null is no folder"),
        (("--output-json", "."), "Invalid value for '--output-json'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output, (result.output, result.exception)


def test_a_missing_aligner_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mara_fast import tiny

    monkeypatch.setattr("mara_fast.bench.run.load_model", lambda *args, **options: pytest.fail())
    models = ("-m", str(tiny.LM_PATH), "-a", str(tiny.AGENT_PATH))
    result = run(*models, "--aligner", str(tmp_path / "none"))
    assert result.exit_code == 2, (result.output, result.exception)
    assert f"aligner '{tmp_path}/none': " in " ".join(result.output.split())


def test_a_model_is_calibrated_to_a_profile() -> None:
    model = random_llama(**NANO)
    prompts = [[3 + 7 * i + j for j in range(8)] for i in range(8)]
    agent = calibrate(model, prompts, forced=0.33)
    from mara_fast import Engine

    answers = Engine(model, agent, max_batch_size=8).generate(
        prompts, max_new_tokens=32, ignore_eos=True
    )
    found = report.profile(sum((answer.stats for answer in answers), DecodingStats()))
    assert 0.2 < found["forced_frac"] < 0.45
    assert 0.5 < found["rank0_accepted_frac"] < 0.9
    assert 1 < found["candidates_per_token"] < 3


def test_parts_are_restored_and_add_up() -> None:
    before = {
        (owner, name): getattr(owner, name)
        for places in measure.PARTS.values()
        for owner, name in places
    }

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        measure.time_by_part(fail, random_llama(**NANO).device)
    assert all(getattr(owner, name) is kept for (owner, name), kept in before.items())


def test_targets_name_what_is_missing() -> None:
    batch = {"batch_size": 1, "ratios": {targets.PLAIN: 0.79, targets.SERIAL: 1.3}}
    judged = {
        (one["name"], one["batch_size"]): one["met"] for one in targets.judge([batch], device="cpu")
    }
    assert judged[targets.PLAIN, 1] is False and judged[targets.SERIAL, 1] is True
    assert judged[targets.ALIGNER, 1] is None and judged[targets.SERIAL, 16] is None
    assert all(one["met"] is None for one in targets.judge([], device="cuda"))


def test_threads_and_defaults() -> None:
    config = BenchConfig(device="cpu")
    assert config.sizes == [1, 16] and len(config.names) == 6


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/home/me/venv/bin/mara-fast", "bench", "--seed", "1"], "mara-fast bench --seed 1"),
        (
            ["benchmarks/tiny_folds.py", "--folder", "a b"],
            "python benchmarks/tiny_folds.py --folder 'a b'",
        ),
        (["/home/me/mara/cli.py", "--targets"], "python cli.py --targets"),
    ],
)
def test_a_report_names_no_folder_of_the_machine(
    arguments: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert facts.facts("a machine")["command"] == command


def test_a_report_names_the_module_that_was_run(tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "from mara_fast.bench.facts import facts; print(facts('x')['command'])"
    )
    paths = [str(tmp_path), *filter(None, sys.path)]
    found = subprocess.run(
        [sys.executable, "-m", "named", "--seed", "1"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert found.stdout == "python -m named --seed 1\n"
