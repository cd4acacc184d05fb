"""The prompts of an evaluation, each once: the paper counts unique ones (199, 700, 488)."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

from mara_fast.jsonl import PromptRecord, check_prompt, json_line, read_prompts
from mara_fast.options import check, is_int, plain, text_of_path
from mara_fast.tiny.grammar import instructions

TINY_HALVES: dict[str, bool | None] = {"tiny": None, "tiny/benign": False, "tiny/harmful": True}
"""The instructions of the tiny world by name: all, those that are harmful or those that are not."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Prompts: of a file, of a data set on the hub, or of the tiny world."""

    path: str | None = None
    """JSON or JSONL of objects with prompt, messages or instruction; or ``tiny``, the held-out
    instructions of the tiny world, ``tiny/benign`` or ``tiny/harmful``, a half of them."""
    hub: str | None = None
    """Hub id; needs the package datasets."""
    name: str | None = None
    """Configuration of the data set on the hub."""
    split: str = "test"
    column: str = "prompt"
    """Of the prompts."""
    sample: int | None = None
    """So many of the unique prompts, drawn at random, the same every time; None: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", text_of_path(self.path))
        object.__setattr__(self, "sample", plain(self.sample))
        for name in ("path", "hub", "name", "split", "column"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("split", "column")):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: a text")
        if self.sample is not None:
            check("sample", self.sample, is_int, "an integer >= 1", minimum=1)
        if (self.path is None) == (self.hub is None):
            raise ValueError("a data set has a path, or a hub id: one of the two is needed")
        for name, default in (("name", None), ("split", "test"), ("column", "prompt")):
            if self.path is not None and getattr(self, name) != default:
                warnings.warn(
                    f"{name}={getattr(self, name)!r} has no effect: the data set is a file",
                    stacklevel=2,
                )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as it is evaluated on."""

    name: str
    records: tuple[PromptRecord, ...]
    """Of unique prompts, the first of each."""
    num_unique: int
    """Unique prompts, of which the records may be some."""
    num_rows: int
    """Before prompts that occur twice were left out."""

    def place(self, record: PromptRecord) -> str:
        """Of a record, for messages."""
        return f"data set {self.name}, {record.where}: prompt {record.id!r}"


def counts(num_evaluated: int, num_unique: int, num_rows: int) -> str:
    """What is said of the prompts of a data set."""
    of = "" if num_evaluated == num_unique else f"{num_evaluated} of "
    return f"{of}{num_unique} unique prompts ({num_rows} rows)"


def load_dataset(name: str, spec: DatasetSpec, *, limit: int | None = None) -> Dataset:
    """Reads a data set.

    Args:
        name: of the data set.
        spec: where it is.
        limit: so many of its first unique prompts; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts, or something else than prompts.
        ImportError: the hub needs the package datasets.
    """
    try:
        found = _rows(spec)
    except ValueError as error:
        raise ValueError(f"data set {name}: {error}") from error
    if not found:
        raise ValueError(f"data set {name} has no prompts")
    unique: dict[str, PromptRecord] = {}
    for record in found:
        unique.setdefault(json_line({"prompt": record.prompt}), record)
    records = list(unique.values())
    # Files of scores have texts as ids, where 1 and "1" are one.
    by_text: dict[str, PromptRecord] = {}
    for record in records:
        other = by_text.setdefault(str(record.id), record)
        if other is not record:
            raise ValueError(
                f"data set {name}: {record.where} has id {record.id!r}, {other.where} has "
                f"{other.id!r}; ids must differ as texts"
            )
    if spec.sample is not None and spec.sample < len(records):
        chosen = random.Random(0).sample(range(len(records)), spec.sample)
        records = [records[index] for index in sorted(chosen)]
    return Dataset(
        name=name, records=tuple(records[:limit]), num_unique=len(unique), num_rows=len(found)
    )


def _rows(spec: DatasetSpec) -> list[PromptRecord]:
    if spec.path in TINY_HALVES:
        half = TINY_HALVES[spec.path]
        found = [one for one in instructions(split="heldout") if half in (None, one.harmful)]
        return [
            PromptRecord(i, one.text, i, where=f"{spec.path}, instruction {i}")
            for i, one in enumerate(found)
        ]
    if spec.path is not None:
        return read_prompts(Path(spec.path))
    try:
        from datasets import load_dataset as load_from_hub
    except ImportError as error:
        raise ImportError("data sets of the hub need: pip install datasets") from error
    rows = load_from_hub(spec.hub, spec.name, split=spec.split)
    if spec.column not in rows.column_names:
        raise ValueError(
            f"{spec.hub} has no column {spec.column!r}; it has {', '.join(rows.column_names)}"
        )
    records = []
    for index, prompt in enumerate(rows[spec.column]):
        where = f"{spec.hub}, row {index}"
        check_prompt(where, spec.column, prompt)
        records.append(PromptRecord(index, prompt, index, where=where))
    return records
