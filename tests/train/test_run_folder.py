"""The folder of a run: who may write there, and what happens to what is damaged or in the way."""

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

import mara_fast.tiny.lm
import mara_fast.tiny.reward_training
import mara_train.tiny
from mara_fast import MaraAgent
from mara_train import checkpoint
from mara_train.run_folder import check_place, fingerprint, locked
from tiny_run import trainer


def test_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom mara_train.run_folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    with pytest.raises(BlockingIOError, match=f"another run is writing to {tmp_path}"):
        trainer(tmp_path).train()
    # However it ends, its lock goes with it.
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_places_that_cannot_be(tmp_path: Path) -> None:
    check_place(tmp_path / "a/b/c")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file is no folder"):
            trainer(place)
    assert not (tmp_path / "a").exists()


def test_fingerprints() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "x": 1}, {"prompt": "b", "x": torch.float32}]
    assert fingerprint(rows) == fingerprint([dict(reversed(row.items())) for row in rows])
    assert len({fingerprint(part) for part in (rows, rows[::-1], rows[:1], [])}) == 4


def test_an_agent_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    with pytest.raises(FileExistsError, match="holds an agent already"):
        trainer(tmp_path).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, num_episodes=20, save_steps=1).train()
    return folder


@pytest.mark.parametrize("name", ["trainer_state.json", "learner.pt", "replay.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_checkpoint_is_named(
    name: str, share: float, whole: Path, tmp_path: Path
) -> None:
    newest = whole / "checkpoint-2"
    kept = (newest / name).read_bytes()
    (newest / name).write_bytes(kept[: int(len(kept) * share)])
    message = re.escape(f"{newest / name} is damaged (") + r".*\); remove \S+checkpoint-2 to go on "
    with pytest.raises(ValueError, match=message + "from checkpoint-1$"):
        trainer(whole, num_episodes=20).train(resume_from_checkpoint=True)
    (newest / name).write_bytes(kept)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    message = f"{tmp_path}/checkpoint-3 could not be written: .*No space left.* MB are free there"
    with pytest.raises(OSError, match=message):
        checkpoint.write(tmp_path, 3, fill, keep=None)
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_run_that_learned_nothing_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mara_train"):
        trainer(tmp_path, num_episodes=2, learning_starts=500).train()
    assert any("the agent has learned nothing" in message for message in caplog.messages)


class Other(TrainerCallback):
    """Never made."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent": "path"}, "agent must be a MaraAgent or None, got str"),
        ({"callbacks": Other}, "must be TrainerCallback objects, got the class Other"),
        ({"callbacks": [3]}, "must be TrainerCallback objects, got a int"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    from mara_train import MaraConfig, MaraTrainer

    config = MaraConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        MaraTrainer("/no/model", len, config, train_dataset=["Hi"], **options)


def test_what_to_resume_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume_from_checkpoint=3 is not allowed"):
        trainer(tmp_path).train(resume_from_checkpoint=3)  # type: ignore[arg-type]


COMMANDS = {
    "lm": mara_fast.tiny.lm.main,
    "rewards": mara_fast.tiny.reward_training.main,
    "agent": mara_train.tiny.main,
}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("lm", "", "Missing option '--output'"),
        ("lm", "--output file", "is a file"),
        ("lm", "--output x --fold 9", "Invalid value for '--fold'"),
        ("lm", "--output x --max-steps 0", "Invalid value for '--max-steps'"),
        ("lm", "--output x --seed -1", "Invalid value for '--seed'"),
        ("rewards", "", "Missing option '--output'"),
        ("rewards", "--output x --lm empty", "empty holds no model: it has no config.json"),
        ("agent", "--output file", "is a file"),
        ("agent", "--output file/below", "file is no folder"),
        ("agent", "--output taken", "taken holds an agent already"),
        ("agent", "--output x --seed -1", "Invalid value for '--seed'"),
        ("agent", "--output x --num-controls -1", "Invalid value for '--num-controls'"),
        ("agent", "--output x --fold 2", "need a --world"),
        ("agent", "--output x --world empty", "--world empty has no lm, reward, cost"),
        ("agent", "--output x --world taken --make-world", "--world taken has lm already"),
    ],
)
def test_the_tiny_worlds_commands_look_first(
    command: str, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("empty", "taken/agent", "taken/lm"):
        (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(COMMANDS[command])
    result = CliRunner().invoke(app, arguments.split(), env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2 and message in result.output, (result.output, result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_agent_is_not_trained_over(whole: Path) -> None:
    assert MaraAgent.from_pretrained(whole / "agent").config.base_model == "tiny"
    with pytest.raises(FileExistsError, match="checkpoints of an earlier run"):
        trainer(whole).train()
