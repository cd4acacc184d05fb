"""Prompts of an evaluation, each once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from golden import golden_folder
from mara_fast.evaluation.cli import app
from mara_fast.evaluation.datasets import DatasetSpec, load_dataset

SHARED = golden_folder()


def written(path: Path, rows: list[Any]) -> DatasetSpec:
    path.write_text(json.dumps(rows))
    return DatasetSpec(path=str(path))


def test_the_first_of_equal_prompts_stays(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    rows = [
        {"instruction": "a", "id": "x"},
        {"instruction": "b"},
        {"instruction": "a", "id": "y"},
        {"messages": chat},
        {"messages": chat},
    ]
    found = load_dataset("mine", written(tmp_path / "rows.json", rows))
    assert found.num_rows == 5
    assert [(r.id, r.prompt, r.sequence) for r in found.records] == [
        ("x", "a", 0),
        (1, "b", 1),
        (3, chat, 3),
    ]
    few = load_dataset("mine", written(tmp_path / "rows.json", rows), limit=2)
    assert few.records == found.records[:2] and few.num_rows == 5


def test_the_tiny_world_s() -> None:
    everything, *halves = (
        load_dataset("tiny", DatasetSpec(path=path)).records
        for path in ("tiny", "tiny/benign", "tiny/harmful")
    )
    assert len(everything) > 300 and all(halves)
    assert {r.prompt for r in everything} == {r.prompt for half in halves for r in half}
    assert len(everything) == sum(map(len, halves))


def test_a_sample_is_drawn_once_for_all() -> None:
    one, other = (load_dataset("tiny", DatasetSpec(path="tiny", sample=40)) for _ in range(2))
    everything = load_dataset("tiny", DatasetSpec(path="tiny"))
    assert one == other and len(one.records) == 40 and one.num_rows == everything.num_rows
    assert set(r.id for r in one.records) < set(r.id for r in everything.records)
    assert one.records != everything.records[:40]
    few = load_dataset("tiny", DatasetSpec(path="tiny", sample=40), limit=3)
    assert few.records == one.records[:3]
    assert load_dataset("tiny", DatasetSpec(path="tiny", sample=10**6)) == everything
    with pytest.raises(ValueError, match="sample=0 is not allowed"):
        DatasetSpec(path="tiny", sample=0)


def test_bad_data_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set mine has no prompts"):
        load_dataset("mine", written(tmp_path / "none.json", []))
    with pytest.raises(ValueError, match=r"data set mine: .*record 0 has no prompt"):
        load_dataset("mine", written(tmp_path / "bad.json", [{"text": "a"}]))
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_dataset("mine", DatasetSpec(path=str(tmp_path / "nowhere.json")))


def test_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "a"], "other": [1, 2, 3]})
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows, raising=True
    )
    found = load_dataset("hub", DatasetSpec(hub="org/data", split="train"))
    assert [r.prompt for r in found.records] == ["a", "b"]
    assert asked == [(("org/data", None), {"split": "train"})]
    with pytest.raises(ValueError, match="no column 'question'; it has prompt, other"):
        load_dataset("hub", DatasetSpec(hub="org/data", column="question"))
    for bad in (None, {"text": "a"}):
        rows = datasets.Dataset.from_dict({"prompt": [bad]})
        with pytest.raises(
            ValueError, match="data set hub: org/data, row 0: prompt must be a text"
        ):
            load_dataset("hub", DatasetSpec(hub="org/data"))


def test_the_package_of_the_hub_s_data_sets_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a line, as for anything else that a user can help."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "spec.yaml"
    path.write_text(
        "systems: {a: {}, b: {}}\ncomparisons: [a vs b]\njudge: {rewards: tiny/reward}\n"
        "datasets: {one: {hub: org/data}}\n"
    )
    result = CliRunner().invoke(app, [str(path), "--dry-run"])
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("need: pip install datasets")


@pytest.mark.skipif(SHARED is None, reason="no prompts of the paper's data sets")
@pytest.mark.parametrize(
    ("name", "rows", "unique"),
    [("saferlhf", 200, 199), ("beavertails", 700, 700), ("harmfulqa", 490, 488)],
)
def test_the_paper_s_counts(name: str, rows: int, unique: int) -> None:
    assert SHARED is not None
    path = SHARED.parent / "prompts" / f"{name}-test.json"
    found = load_dataset(name, DatasetSpec(path=str(path)))
    assert (found.num_rows, len(found.records)) == (rows, unique)
