"""Engines in processes of their own give the answers of one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mara_fast import DecodingConfig, Engine, tiny
from mara_fast.cli import app
from mara_fast.data_parallel import EngineOptions, ParallelEngine

PROMPTS: list[Any] = [
    "How do I bake bread?",
    [{"role": "user", "content": "How do I steal a bicycle?"}],
    [5, 17, 40],
    "Teach me to bake bread.",
    "What does it take to shame a cousin?",
]
CONFIG = DecodingConfig(max_new_tokens=10, acceptance="sample", seed=3)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """Started once: it takes a while."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray")
def test_two_engines_answer_as_one(tmp_path: Path) -> None:
    engine = ParallelEngine(EngineOptions(model="tiny", max_batch_size=1), num_workers=2)
    keys = [7, 3, 9, 1, 2**40]
    found = dict(engine.as_completed(PROMPTS, CONFIG, sequence_ids=keys))
    wanted = Engine("tiny").generate(PROMPTS, CONFIG, sequence_ids=keys)
    assert [found[i].token_ids for i in range(5)] == [one.token_ids for one in wanted]
    assert [found[i].prompt for i in range(5)] == PROMPTS
    assert found[0].stats.accepted_ranks == wanted[0].stats.accepted_ranks
    assert list(engine.as_completed([], CONFIG)) == []

    # The command, with the agent's own options, goes on where one engine stopped.
    lines = [json.dumps({"prompt": one}) for one in PROMPTS if isinstance(one, str)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = ["generate", "-i", str(tmp_path / "in.jsonl"), "--max-new-tokens", "8"]
    out = tmp_path / "out.jsonl"
    assert CliRunner().invoke(app, [*command, "-o", str(out)]).exit_code == 0
    whole = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    out.write_text(out.read_text().splitlines(keepends=True)[0])
    result = CliRunner().invoke(app, [*command, "-o", str(out), "--num-gpus", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    again = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert len(again) == 3
    for number, row in again.items():
        assert row["token_ids"] == whole[number]["token_ids"]


def test_what_an_engine_would_refuse_is_refused_first() -> None:
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    options = EngineOptions(model=str(tiny.LM_PATH), agent=False)
    engine = ParallelEngine(options, num_workers=2)
    assert engine.agent is None and str(engine.dtype) == "torch.float32"
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens; with max_new_tokens=1000"):
        engine.as_completed(["Hi", "How do I bake bread?" * 10], engine.config(max_new_tokens=1000))
    with pytest.raises(ValueError, match="config must be a DecodingConfig"):
        engine.config(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_the_number_of_engines_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=f"num_workers={value!r} is not allowed"):
        ParallelEngine(EngineOptions(model="tiny"), num_workers=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-gpus", "2", "Hi"), "--num-gpus needs --input"),
        (("--num-gpus", "2", "-i", "x", "--tensor-parallel"), "--num-gpus or --tensor-parallel"),
        (("--tensor-parallel", "Hi"), "start it by torchrun"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert result.exit_code == 2 and message in result.output
