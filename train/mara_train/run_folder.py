"""The folder of a run: who may write there, and whether a run may go on from what it holds."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mara_train import checkpoint
from mara_train.config import SECTIONS, MaraConfig

AGENT_NAME = "agent"
_LOCK_NAME = ".lock"

# Of a resumed run; others may change what was computed so far.
_FREE_OPTIONS = frozenset(
    {
        "output_dir",
        "num_collectors",
        "num_episodes",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "completions_per_log",
        "report_to",
        "run_name",
    }
)


def check_place(folder: Path) -> None:
    """Whether a run could write there; nothing is made.

    Raises:
        NotADirectoryError: it, or a folder above it, is something else.
        PermissionError: it cannot be written to.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"output_dir={str(folder)!r}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir={str(folder)!r}: {place} cannot be written to")


def check_unused(folder: Path) -> None:
    """Whether a new run may begin there.

    Raises:
        FileExistsError: it holds checkpoints or an agent.
    """
    if checkpoint.checkpoints(folder):
        raise FileExistsError(
            f"{folder} holds checkpoints of an earlier run: resume it (--resume), or give another "
            "output_dir (--output)"
        )
    if (folder / AGENT_NAME).exists():
        raise FileExistsError(
            f"{folder} holds an agent already ({folder / AGENT_NAME}): give another output_dir "
            "(--output)"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time writes there; the lock goes with the process that has it.

    Raises:
        BlockingIOError: another one does.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another run is writing to {folder}: wait for it, or give another output_dir "
            "(--output)"
        ) from error
    try:
        yield
    finally:
        # The file stays: one that is removed can be locked twice.
        lock.release()


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of prompts and the columns beside them, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(dict(row), sort_keys=True, default=repr, ensure_ascii=False)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def check_continues(
    path: Path, state: Mapping[str, Any], config: MaraConfig, facts: Mapping[str, Any]
) -> None:
    """Whether a run with these options may go on from a checkpoint.

    Args:
        path: of the checkpoint.
        state: its :func:`checkpoint.read_state`.
        config: options of the run.
        facts: what else has to be the same; one that is None is not known yet.

    Raises:
        ValueError: naming all that differs, with both values.
    """
    theirs, mine = MaraConfig.from_dict(state.get("config", {})).to_dict(), config.to_dict()
    # Schedules are a matter of the whole run.
    is_scheduled = (
        config.learning_rate_schedule != "constant" or config.final_target_entropy is not None
    )
    free = _FREE_OPTIONS - ({"num_episodes"} if is_scheduled else set())
    pairs = {
        name: (state.get(name), value) for name, value in facts.items() if value is not None
    } | {
        name: (theirs[name], mine[name])
        for name in mine
        if name not in free and name not in SECTIONS
    }
    for section in SECTIONS:
        for name, value in mine[section].items():
            pairs[f"{section}.{name}"] = theirs[section][name], value
    differing = [
        f"{name} ({there!r} there, {here!r} here)"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if differing:
        hint = ""
        if is_scheduled and theirs["num_episodes"] != mine["num_episodes"]:
            hint = (
                "; the length can change only without schedules, that is with "
                "learning_rate_schedule='constant' and final_target_entropy=None"
            )
        raise ValueError(f"{path} is of another run; what differs: {', '.join(differing)}{hint}")
