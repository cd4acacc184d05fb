"""The fine-tuned baselines: what they are taught, what they write, what they refuse."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mara_fast import Engine, tiny
from mara_fast.evaluation.spec import SystemSpec
from mara_fast.rewards import Rewards
from mara_fast.tiny.grammar import instructions
from mara_fast.tiny.reward_models import COST_PATH, REWARD_PATH

pytest.importorskip("trl", reason="needs the extra [train]")

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
METHODS = ("dpo", "rloo", "aligner")


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    return _script("baselines")


@pytest.fixture(scope="module")
def train_data() -> ModuleType:
    return _script("train_data")


def _script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """A few steps of each."""
    return {
        "dpo": _script("dpo").DpoConfig(
            num_instructions=8, batch_size=4, num_epochs=1, max_steps=2
        ),
        "rloo": _script("rloo").RlooConfig(num_steps=2, batch_size=4, steps_per_generation=2),
        "aligner": _script("aligner").AlignerConfig(num_instructions=4, num_answers=3, max_steps=2),
    }


@pytest.fixture(scope="module")
def pools(train_data: ModuleType) -> list[Any]:
    return train_data.sample_pools("tiny", _questions(6), num_answers=4, seed=3)


def _questions(num: int) -> list[str]:
    return [one.text for one in instructions(split="train")[:: 2688 // num]][:num]


def _train(baselines: ModuleType, method: str, output: Path, **options: Any) -> None:
    baselines.TRAININGS[method]("tiny", output, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_loads_in_an_engine_and_is_another_model(
    baselines: ModuleType, quick: dict[str, Any], method: str, tmp_path: Path
) -> None:
    _train(baselines, method, tmp_path / "model", config=quick[method])
    engine = Engine(str(tmp_path / "model"), False)
    base, tokenizer = tiny.load()
    assert engine.tokenizer.chat_template == tokenizer.chat_template
    assert engine.lm.model.generation_config.eos_token_id == tokenizer.eos_token_id
    (answer,) = engine.generate("How do I bake bread?", max_new_tokens=8)
    assert answer.token_ids
    changed = [
        not torch.equal(ours, theirs)
        for ours, theirs in zip(engine.lm.model.parameters(), base.parameters(), strict=True)
    ]
    assert any(changed)


@pytest.mark.parametrize(
    "method", ["dpo", *(pytest.param(one, marks=pytest.mark.slow) for one in METHODS[1:])]
)
def test_a_training_repeats_byte_for_byte(
    baselines: ModuleType, quick: dict[str, Any], method: str, tmp_path: Path
) -> None:
    weights = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        # What ran before does not matter.
        torch.manual_seed(len(weights))
        _train(baselines, method, tmp_path / name, seed=seed, config=quick[method])
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_pairs_are_the_same_again(train_data: ModuleType, pools: list[Any]) -> None:
    again = train_data.sample_pools("tiny", _questions(6), num_answers=4, seed=3)
    assert _script("dpo").preference_pairs(again) == _script("dpo").preference_pairs(pools)
    other = train_data.sample_pools("tiny", _questions(6), num_answers=4, seed=4)
    assert _script("dpo").preference_pairs(other) != _script("dpo").preference_pairs(pools)


def test_chosen_beats_rejected_by_reward_minus_cost(pools: list[Any]) -> None:
    pairs = _script("dpo").preference_pairs(pools)
    assert len(pairs) >= 4
    asked = [pair["prompt"][0]["content"] for pair in pairs]
    assert set(asked) <= set(_questions(6))
    reward, cost = (Rewards(str(path), device="cpu") for path in (REWARD_PATH, COST_PATH))

    def values(kind: str) -> torch.Tensor:
        texts = [pair[kind][0]["content"] for pair in pairs]
        return reward.score(asked, texts).total - cost.score(asked, texts).total

    assert (values("chosen") > values("rejected")).all()


def test_a_pool_is_ordered_and_has_no_answer_twice(pools: list[Any]) -> None:
    for pool in pools:
        assert list(pool.rewards) == sorted(pool.rewards, reverse=True)
        assert len(set(pool.answers)) == len(pool.answers) == len(pool.rewards)


def test_one_answer_makes_no_pair(train_data: ModuleType) -> None:
    pool = train_data.Pool(question="Why?", answers=("So.",), rewards=(1.0,))
    assert _script("dpo").preference_pairs([pool]) == []


def test_corrections_lead_to_the_best_answer(train_data: ModuleType) -> None:
    pool = train_data.Pool(question="Why?", answers=("Best.", "Good.", "Bad."), rewards=(2.0, 1, 0))
    options = {"num_edited": 2, "seed": 0}
    rows = _script("aligner").corrections([pool], ["Greedy."], identity_share=0.0, **options)
    assert {row["completion"] for row in rows} == {"Best.<|end|>"}
    assert rows[0]["prompt"] == "<|user|>Why?<|user|>Greedy.<|assistant|>"
    assert len(rows) == len({row["prompt"] for row in rows}) == 3
    for row in _script("aligner").corrections([pool], ["Greedy."], identity_share=1.0, **options):
        assert row["prompt"] == "<|user|>Why?<|user|>Best.<|assistant|>"


def test_the_template_comes_back_from_the_tokenizer() -> None:
    """As an evaluation encodes it, and as the chat template writes the same places."""
    SystemSpec(corrects="base", template=_script("aligner").TINY_ALIGNER_TEMPLATE)
    tokenizer = tiny.load()[1]
    text = _script("aligner").aligner_prompt("How do I {sing}?", "Like {answer} this.")
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert "How do I {sing}?" in text and "Like {answer} this." in text
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert [token for token in ids if token in (user, assistant)] == [user, user, assistant]
    assert ids[1] == user and ids[-1] == assistant


@pytest.mark.parametrize("prompts", ["benign", "harmful", "mixed"])
def test_instructions_are_of_the_kind_asked_for(train_data: ModuleType, prompts: str) -> None:
    asked = set(train_data.train_instructions(prompts))
    found = [one for one in instructions(split="train") if one.text in asked]
    kinds = {"benign": {False}, "harmful": {True}, "mixed": {False, True}}
    assert {one.harmful for one in found} == kinds[prompts]
    assert not asked & {one.text for one in instructions(split="heldout")}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_wrong_is_said_before_any_work(
    baselines: ModuleType, method: str, tmp_path: Path
) -> None:
    train = baselines.TRAININGS[method]
    with pytest.raises(ValueError, match=r"prompts='rude' is not known; allowed: mixed"):
        train("tiny", tmp_path / "new", prompts="rude", seed=0)
    with pytest.raises(FileNotFoundError, match="no-such-lm"):
        train(tmp_path / "no-such-lm", tmp_path / "new", prompts="mixed", seed=0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        train("tiny", tmp_path, prompts="mixed", seed=0)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        train("tiny", tmp_path / "note.txt", prompts="mixed", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_the_command_trains_the_method_it_names(
    baselines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    called: list[Any] = []
    for method in METHODS:
        monkeypatch.setitem(
            baselines.TRAININGS, method, lambda *a, m=method, **k: called.append((m, a, k))
        )
    app = typer.Typer()
    app.command()(baselines.main)
    for method in METHODS:
        options = ["--output", str(tmp_path), "--seed", "5", "--prompts", "benign"]
        result = CliRunner().invoke(app, [method, *options])
        assert result.exit_code == 0, result.output
    expected = ("tiny", tmp_path), {"prompts": "benign", "seed": 5}
    assert called == [(method, *expected) for method in METHODS]
    assert CliRunner().invoke(app, ["ppo", "--output", str(tmp_path)]).exit_code == 2


@pytest.mark.slow
def test_dpo_is_preferred_over_the_base_models_greedy_answers(
    baselines: ModuleType, tmp_path: Path
) -> None:
    from mara_train.tiny import Judge, recipe

    baselines.TRAININGS["dpo"]("tiny", tmp_path / "dpo", prompts="mixed", seed=0)
    judge = Judge(recipe(output_dir=str(tmp_path)))
    engine = Engine(str(tmp_path / "dpo"), False, max_batch_size=64)
    judgement = judge.of(engine.generate(judge.prompts, judge.decoding))
    assert judgement.vs_greedy > 0.3
    assert judgement.malformed < 0.1
