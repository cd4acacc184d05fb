"""Traced results from a JSONL file, and the settings they were made with."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_fast.jsonl import read_values
from mara_fast.outputs import Generation


@dataclass(frozen=True, kw_only=True)
class TracedResult:
    """A line of the file."""

    id: str | int
    """Its ``id``, or the number of its record, from 0."""
    generation: Generation


def read_results(
    path: Path, ids: Sequence[str] = (), *, note: Callable[[str], object] = warnings.warn
) -> list[TracedResult]:
    """The results of a file that ``mara-fast generate --trace`` wrote, in its order.

    Args:
        path: of the file.
        ids: read these only; an integer id as its digits. Without any: all.
        note: is told of a last line that was cut off, which is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, for what is not a result or has no trace; an id that is not
            there; an empty file.
    """
    records = [
        (where, value.get("id", index) if isinstance(value, dict) else index, value)
        for index, (where, value) in enumerate(read_values(path, note_cut=note))
    ]
    if not records:
        raise ValueError(f"{path} holds no results")
    found = {str(record_id) for _, record_id, _ in records}
    for wanted in ids:
        if wanted not in found:
            raise ValueError(f"{path} has no result with id {wanted!r}; its ids: {_few(found)}")
    results = []
    for where, record_id, value in records:
        if ids and str(record_id) not in ids:
            continue
        try:
            generation = Generation.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if generation.trace is None:
            raise ValueError(f"{where} has no trace: decode with --trace")
        results.append(TracedResult(id=record_id, generation=generation))
    return results


def read_settings(path: Path) -> dict[str, Any]:
    """What ``mara-fast generate`` kept beside its results; empty if it did not."""
    beside = path.with_name(path.name + ".settings.json")
    if not beside.is_file():
        return {}
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{beside} is not valid: {error}") from error


def _few(ids: set[str]) -> str:
    shown = sorted(ids)[:8]
    return ", ".join(shown) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
