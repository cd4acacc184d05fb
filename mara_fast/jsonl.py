"""Prompts from a JSONL file, results into one, resumable by id.

A result is written as soon as it is done, one line each, in order of completion. A run that was
stopped anywhere goes on where it was: ids already in the output are not decoded again, a line cut
off by the stop is dropped, and other settings than those of the first run are refused.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mara_fast.outputs import Generation

PROMPT_KEYS = ("prompt", "messages", "instruction")


@dataclass(frozen=True)
class PromptRecord:
    """A line of the input."""

    id: str | int
    """Its ``id``, or the number of its record, from 0."""
    prompt: Any
    sequence: int
    """Number of the record: keys the draws, so that a resumed run draws the same."""


def read_prompts(path: Path) -> list[PromptRecord]:
    """The prompts of a JSONL file, or of a JSON file with a list.

    A record is an object with one of the keys ``prompt``, ``messages`` or ``instruction`` and
    optionally an ``id``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, for what is not such a record, or an id given twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    records: list[PromptRecord] = []
    lines_of_ids: dict[str | int, str] = {}
    for where, value in _values(path, text):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a {type(value).__name__}, expected an object")
        keys = [key for key in PROMPT_KEYS if key in value]
        if len(keys) != 1:
            raise ValueError(
                f"{where} has {' and '.join(keys) or 'no prompt'}; "
                f"expected one of the keys {', '.join(PROMPT_KEYS)}"
            )
        record_id = value.get("id", len(records))
        if not isinstance(record_id, str | int) or isinstance(record_id, bool):
            raise ValueError(f"{where}: id must be a text or an integer, got {record_id!r}")
        if record_id in lines_of_ids:
            raise ValueError(
                f"{where}: id {record_id!r} was given before, {lines_of_ids[record_id]}"
            )
        lines_of_ids[record_id] = where
        records.append(PromptRecord(record_id, value[keys[0]], len(records)))
    return records


def _values(path: Path, text: str) -> list[tuple[str, Any]]:
    """(place, value) of every record."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        return [(f"{path}, record {index}", value) for index, value in enumerate(values)]
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                found.append((where, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from error
    return found


class ResultFile:
    """A JSONL file of results that is only ever added to. Use as a context manager.

    Args:
        path: of the file; its settings are kept beside it in ``<path>.settings.json``.
        settings: what the results depend on; a resumed run must have the same.
        overwrite: start anew.

    Raises:
        ValueError: the file is another run's: other settings, or not JSONL of results.
        RuntimeError: another process is writing it.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.settings_path = path.with_name(path.name + ".settings.json")
        self.done: set[str | int] = set()
        self._settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._read_done()
            self._check_settings()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, record_id: str | int, generation: Generation) -> None:
        """Appends a result; after the call it is in the file."""
        line = json.dumps({"id": record_id} | generation.to_dict(), ensure_ascii=False)
        # One write of a whole line: a stop leaves at most the last one incomplete.
        self._file.write((line + "\n").encode())
        self._file.flush()
        self.done.add(record_id)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is writing {self.path}") from error

    def _read_done(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self.done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is not a result of this command; "
                    "name another output, or overwrite this one"
                ) from error
            end += len(line)
        self._file.truncate(end)

    def _check_settings(self) -> None:
        if self.done and self.settings_path.is_file():
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
            changed = [
                f"{name} was {before.get(name)!r}, is {self._settings.get(name)!r}"
                for name in sorted(before.keys() | self._settings.keys())
                if before.get(name) != self._settings.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.path} holds results of other settings ({'; '.join(changed)}); "
                    "name another output, or overwrite this one"
                )
        text = json.dumps(self._settings, indent=2, ensure_ascii=False)
        self.settings_path.write_text(text + "\n", encoding="utf-8")
