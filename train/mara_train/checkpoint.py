"""Checkpoints: folders that appear whole or not at all, with everything an exact resume needs.

checkpoint-N/
    agent/                config.json, model.safetensors, model card: loads as any agent
    trainer_state.json    config, counts, scales
    learner.pt            critics, α, optimizers, generator of the batches
    replay.pt             transitions
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if _NAME.fullmatch(path.name) and (path / STATE_NAME).is_file()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of a checkpoint."""
    return int(path.name.partition("-")[2])


def write(folder: Path, step: int, fill: Callable[[Path], None], *, keep: int | None) -> Path:
    """Has ``fill`` write a checkpoint's files, then puts it in place at once.

    Args:
        folder: of the run.
        step: its number.
        fill: writes into the folder it is given.
        keep: checkpoints that stay, the newest up to this step; None: all. What a run that was
            resumed further back finds ahead of it stays in any case.
    """
    target, partial = folder / f"checkpoint-{step}", folder / f".partial-checkpoint-{step}"
    for leftover in folder.glob(".partial-checkpoint-*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        fill(partial)
    # torch says with a RuntimeError that it could not write.
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{target} could not be written: {error} ({free / 1e6:.1f} MB are free there); what "
            "was complete before still is"
        ) from error
    # What a machine loses when it fails must not be inside a folder that looks complete.
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if target.exists():
        # Aside first: between the two renames there is no folder of this name, never half of one.
        os.replace(target, folder / f".partial-checkpoint-{step}-old")
    os.replace(partial, target)
    _sync(folder)
    for leftover in folder.glob(".partial-checkpoint-*"):
        shutil.rmtree(leftover)
    if keep is not None:
        for old in [path for path in checkpoints(folder) if step_of(path) <= step][:-keep]:
            shutil.rmtree(old)
    return target


def find(folder: Path, wanted: bool | str | os.PathLike) -> Path:
    """The checkpoint to resume from: the newest of the folder, or the one named.

    Raises:
        FileNotFoundError: there is none.
    """
    if not isinstance(wanted, bool):
        path = Path(wanted)
        if not (path / STATE_NAME).is_file():
            raise FileNotFoundError(f"{path} is no checkpoint: it has no {STATE_NAME}")
        return path
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"there is no checkpoint to resume from in {folder}")
    return found[-1]


def read_state(path: Path) -> dict[str, Any]:
    """``trainer_state.json`` of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    with _damage_named(path / STATE_NAME):
        state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        return state


def load(path: Path) -> dict[str, Any]:
    """Tensors and plain values; nothing in the file is executed.

    Raises:
        ValueError: it is damaged.
    """
    with _damage_named(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Errors name the file, and the checkpoint to go on from instead."""
    try:
        yield
    except (ValueError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        folder = path.parent
        older = [one for one in checkpoints(folder.parent) if step_of(one) < step_of(folder)]
        instead = f"remove {folder} to go on from {older[-1].name}" if older else "none is older"
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged ({what}); {instead}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
