"""Prompts from a JSONL file, results into one, resumable by id.

A result is written as soon as it is done, one line each, in order of completion. A run that was
stopped anywhere goes on where it was: ids already in the output are not decoded again, a line cut
off by the stop is dropped, and other settings or prompts than those of the first run are refused.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from mara_fast.outputs import Generation
from mara_fast.prompts import is_chat, is_token_ids

PROMPT_KEYS = ("prompt", "messages", "instruction")


@dataclass(frozen=True)
class PromptRecord:
    """A line of the input."""

    id: str | int
    """Its ``id``, or the number of its record, from 0."""
    prompt: Any
    sequence: int
    """Number of the record: keys the draws, so that a resumed run draws the same."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else the record holds."""
    where: str = field(default="", compare=False)
    """File and line."""


def read_prompts(path: Path) -> list[PromptRecord]:
    """The prompts of a JSONL file, or of a JSON file with a list.

    A record is an object with one of the keys ``prompt``, ``messages`` or ``instruction`` and
    optionally an ``id``; what else it holds becomes its columns. The prompt is a text, a chat or
    token ids.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, for what is not such a record, or an id given twice.
    """
    records: list[PromptRecord] = []
    lines_of_ids: dict[str | int, str] = {}
    for where, value in read_values(path):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a {type(value).__name__}, expected an object")
        keys = [key for key in PROMPT_KEYS if key in value]
        if len(keys) != 1:
            raise ValueError(
                f"{where} has {' and '.join(keys) or 'no prompt'}; "
                f"expected one of the keys {', '.join(PROMPT_KEYS)}"
            )
        prompt = value[keys[0]]
        check_prompt(where, keys[0], prompt)
        record_id = value.get("id", len(records))
        if not isinstance(record_id, str | int) or isinstance(record_id, bool):
            raise ValueError(f"{where}: id must be a text or an integer, got {record_id!r}")
        if record_id in lines_of_ids:
            raise ValueError(
                f"{where}: id {record_id!r} was given before, {lines_of_ids[record_id]}"
            )
        lines_of_ids[record_id] = where
        columns = {k: v for k, v in value.items() if k not in (keys[0], "id")}
        records.append(PromptRecord(record_id, prompt, len(records), columns, where))
    return records


def check_prompt(where: str, key: str, prompt: Any) -> None:
    """Raises a ValueError unless a prompt is a text, a chat or token ids."""
    if not (isinstance(prompt, str) or is_chat(prompt) or is_token_ids(prompt)):
        raise ValueError(
            f"{where}: {key} must be a text, a chat (list of objects with role and content) or a "
            f"list of token ids, got {json.dumps(prompt, default=repr)[:60]}"
        )


def read_values(
    path: Path, *, note_cut: Callable[[str], object] | None = None
) -> list[tuple[str, Any]]:
    """(place, value) of every line of a JSONL file, or of every item of a JSON file with a list.

    Args:
        path: of the file.
        note_cut: is told of a last line that was cut off, which is then left out; None: such a
            line is no JSON like any other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the place, for what is not JSON.
    """
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    data = path.read_bytes()
    if note_cut is not None and _is_cut(data):
        data = data[: data.rfind(b"\n") + 1]
        number = data.count(b"\n") + 1
        note_cut(f"{path}, line {number} was cut off, as by a stop: it is left out")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        return [(f"{path}, record {index}", value) for index, value in enumerate(values)]
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                found.append((where, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from error
    return found


def read_results(path: Path, parse: Callable[[Any], Any]) -> dict[str | int, Any]:
    """What every line of a :class:`ResultFile` holds, by id.

    Args:
        path: of the file.
        parse: what is wanted of a line's object.

    Raises:
        ValueError: naming the line, for what is no such object.
    """
    found = {}
    for where, line in read_values(path):
        try:
            found[line["id"]] = parse(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is damaged ({type(error).__name__}: {error}); remove that line, and the "
                "same command makes it anew"
            ) from error
    return found


def forget_results(path: Path) -> None:
    """Empties a :class:`ResultFile`, if there is one.

    Raises:
        RuntimeError: another process is writing it.
    """
    if path.is_file():
        with ResultFile(path, records=(), settings={}, overwrite=True):
            pass


def _is_cut(data: bytes) -> bool:
    """The last line does not end, and is no JSON."""
    *_, last = data.rpartition(b"\n")
    if not last.strip() or data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return False
    try:
        json.loads(last.decode("utf-8-sig"))
    except ValueError:
        return True
    return False


def json_line(record: Mapping[str, Any]) -> str:
    """A record as JSON on one line: readable, and Unicode even where a text is not."""
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace").decode()


class NoFile:
    """Stands for the file in processes that have nothing to write."""

    done: set[str | int] = set()  # noqa: RUF012, replaced by what the file's process says

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def write(self, record_id: str | int, generation: Generation) -> None:
        """Nothing: another process does."""


class ResultFile:
    """A JSONL file of results that is only ever added to. Use as a context manager.

    Args:
        path: of the file; its settings are kept beside it in ``<path>.settings.json``.
        records: the prompts whose results it holds.
        settings: what the results depend on; a resumed run must have the same.
        overwrite: start anew.
        holds: what every line has beside its ``id`` and ``prompt``.

    Raises:
        ValueError: the file is another run's (other prompts, other settings), or not JSONL of
            results.
        RuntimeError: another process is writing it.
    """

    def __init__(
        self,
        path: Path,
        *,
        records: Sequence[PromptRecord],
        settings: Mapping[str, Any],
        overwrite: bool = False,
        holds: str = "finish_reason",
    ) -> None:
        self.path, self._holds = path, holds
        self.settings_path = path.with_name(path.name + ".settings.json")
        self.done: set[str | int] = set()
        self._prompts = {record.id: record.prompt for record in records}
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
        self.append(record_id, generation.to_dict())

    def append(self, record_id: str | int, result: Mapping[str, Any]) -> None:
        """Appends what was found for a record, its prompt included."""
        line = json_line({"id": record_id, **result})
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
                result = json.loads(line)
                record_id, prompt = result["id"], result["prompt"]
                is_result, is_ours = self._holds in result, record_id in self._prompts
            except (ValueError, KeyError, TypeError):
                is_result = False
            if not is_result:
                self._refuse(f"line {number} is not a result of this command")
            if not is_ours:
                self._refuse(f"line {number} has id {record_id!r}, which is not in the input")
            if prompt != self._prompts[record_id]:
                self._refuse(f"line {number} has id {record_id!r} with another prompt")
            self.done.add(record_id)
            end += len(line)
        self._file.truncate(end)

    def _check_settings(self) -> None:
        if self.done and self.settings_path.is_file():
            try:
                before = dict(json.loads(self.settings_path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.settings_path} is not valid: {error}") from error
            changed = [
                f"{name} was {before.get(name)!r}, is {self._settings.get(name)!r}"
                for name in sorted(before.keys() | self._settings.keys())
                if before.get(name) != self._settings.get(name)
            ]
            if changed:
                self._refuse(f"it holds results of other settings ({'; '.join(changed)})")
        text = json.dumps(self._settings, indent=2) + "\n"
        # In one go: a stop leaves the old file or the new one.
        beside = self.settings_path.with_name(self.settings_path.name + ".new")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.settings_path)

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.path}: {reason}; name another output, or overwrite this one")
