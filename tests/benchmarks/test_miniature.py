"""``make paper`` on a world whose trainings are copies of the embedded models."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_fast.tiny import AGENT_PATH, LM_PATH

FOLDER = Path(__file__).parents[2] / "benchmarks/paper"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/paper/miniature.py and world.py, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in (path.stem for path in FOLDER.glob("*.py")):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import miniature
    import world

    return miniature, world


def copied(training: Any, world: Path, **_: Any) -> None:
    """Stands for a training."""
    source = AGENT_PATH if training.kind == "agent" else LM_PATH
    place = training.folder(world)
    shutil.copytree(source, place / "agent" if training.kind == "agent" else place)


def test_what_is_trained(modules: Any) -> None:
    _, world = modules
    names = [(one.upstream, one.name) for one in world.trainings()]
    assert len(set(names)) == len(names)
    assert ("Mistral-S", "dpo-mixed") in names and ("Llama-S", "agent-harmful-1to1") in names
    assert {one.ratio for one in world.trainings()} == {"1:1", "1:0", "0:1", "2:1"}


def test_a_training_is_whole_or_not_there(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, world = modules
    one = world.Training(upstream="Llama-S", kind="dpo")

    def fails(lm: Path, output: Path, *, prompts: str, seed: int) -> None:
        print("so far")
        (output / "config.json").write_text("{}")
        raise RuntimeError("the machine went away")

    monkeypatch.setitem(world.BASELINES, "dpo", fails)
    with pytest.raises(RuntimeError, match="went away"):
        world.train(one, tmp_path, seed=0)
    assert not one.is_done(tmp_path)
    assert (tmp_path / "Llama-S/dpo-mixed.log").read_text() == "so far\n"
    seen = []

    def works(lm: Path, output: Path, *, prompts: str, seed: int) -> None:
        # Nothing of the attempt before is left.
        seen.append((lm, prompts, seed, list(output.iterdir())))
        (output / "config.json").write_text("{}")

    monkeypatch.setitem(world.BASELINES, "dpo", works)
    world.train(one, tmp_path, seed=5)
    assert one.is_done(tmp_path) and seen == [(LM_PATH, "mixed", 5, [])]


def test_workers_end_with_a_parent_that_is_killed() -> None:
    script = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import world
if __name__ == "__main__":
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=world._end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{script}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        # The worker has it open, too: it ends when both are gone.
        parent.communicate(timeout=20)


def test_two_runs_do_not_train_the_same(modules: Any, tmp_path: Path) -> None:
    _, world = modules
    with (
        world.FileLock(tmp_path / ".lock"),
        pytest.raises(RuntimeError, match="another run trains"),
    ):
        world.train_all(tmp_path, seed=0)


@pytest.mark.slow
def test_all_tables(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature, world = modules

    def train_all(folder: Path, *, seed: int) -> None:
        for one in world.trainings():
            if not one.is_done(folder):
                copied(one, folder)

    monkeypatch.setattr(miniature, "train_all", train_all)
    arguments = {"output": tmp_path / "report", "folder": tmp_path / "work", "seed": 0}
    miniature.main(**arguments, sample=1)
    made = {path.suffix: path.read_text() for path in (tmp_path / "report").iterdir()}
    assert set(made) == {".md", ".html", ".json"}
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Figure 3", "Dials"):
        assert f"\n## {title}" in made[".md"] and f"<h2>{title}" in made[".html"]
    assert made[".html"].count("<svg") == 2 and "currentColor" in made[".html"]
    assert miniature._INK not in made[".html"]
    ids = re.findall(r' id="([^"]+)"', made[".html"])
    assert len(set(ids)) == len(ids)
    # Nothing that a reader of the repository does not have.
    assert str(tmp_path) not in made[".md"] + made[".html"]
    # The embedded agent over its own model is the same wherever it is compared.
    rates = {}
    for table in json.loads(made[".json"])["tables"]:
        for one in table["comparisons"]:
            rates.setdefault((one["ours"], one["theirs"], one["dataset"]), set()).add(
                one["preference"]["rate"]
            )
    assert all(len(found) == 1 for found in rates.values())
    # Its copies answer as the model does, and tie with it.
    for dataset in miniature.DATASETS:
        against = [
            rates["Llama-S + MARA", f"Llama-S{one}", dataset] for one in ("", " RLHF", " DPO")
        ]
        assert against[0] == against[1] == against[2]
    # Again, from what is there, to the same page but for nothing.
    miniature.main(**arguments, sample=1)
    again = (tmp_path / "report/paper_miniature.html").read_text()
    assert re.sub(r"dirty|\d{4}-\d\d-\d\d", "", again) == re.sub(
        r"dirty|\d{4}-\d\d-\d\d", "", made[".html"]
    )
