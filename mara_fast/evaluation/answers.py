"""Answers of every system to every prompt, in files that a stopped run goes on from.

<folder>/answers/<system>/<data set>.jsonl       a line per sample, as mara-fast generate writes
"""

import gc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mara_fast.engine import Engine
from mara_fast.evaluation.datasets import Dataset
from mara_fast.evaluation.spec import EvalSpec, SystemSpec
from mara_fast.jsonl import PromptRecord, ResultFile
from mara_fast.loading import load_model, load_tokenizer
from mara_fast.outputs import DecodingStats, Generation


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a system answered to the prompts of a data set, in their order."""

    samples: tuple[tuple[str, ...], ...]
    """Texts by prompt; one each, but for best-of-N."""
    stats: DecodingStats
    """Of all samples."""
    num_failed: int
    """Samples that ended in an error."""
    settings: Mapping[str, Any]
    """What they depend on."""


def answer_all(
    spec: EvalSpec, datasets: Sequence[Dataset], folder: Path, *, overwrite: bool
) -> dict[str, dict[str, Answers]]:
    """Answers by system and data set.

    Args:
        spec: of the evaluation.
        datasets: the prompts.
        folder: of the evaluation.
        overwrite: forget the answers that are there.
    """
    found: dict[str, dict[str, Answers]] = {}
    loader = _Loader(spec.engine)
    total = sum(
        len(dataset.records) * spec.systems[n].best_of for dataset in datasets for n in spec.systems
    )
    with tqdm(total=total, unit="answer") as bar:
        for name in _in_order(spec.systems):
            found[name] = {}
            for dataset in datasets:
                bar.set_description(f"{name} on {dataset.name}")
                found[name][dataset.name] = _answer(
                    spec, name, dataset, found, loader, folder, bar, overwrite=overwrite
                )
    return {name: found[name] for name in spec.systems}


def _answer(
    spec: EvalSpec,
    name: str,
    dataset: Dataset,
    found: Mapping[str, Mapping[str, Answers]],
    loader: "_Loader",
    folder: Path,
    bar: Any,
    *,
    overwrite: bool,
) -> Answers:
    system = spec.systems[name]
    before = None if system.corrects is None else found[system.corrects][dataset.name]
    records = _records(system, dataset, before)
    engine = loader.engine(system)
    config = system.config(spec.decoding, engine.config())
    settings = {
        "model": _name(system.model),
        "agent": _name(system.agent),
        "dtype": str(engine.dtype),
        "samples": system.best_of,
        "corrects": None if before is None else before.settings,
        **config.token_options(),
    }
    path = folder / "answers" / name / f"{dataset.name}.jsonl"
    with ResultFile(path, records=records, settings=settings, overwrite=overwrite) as results:
        bar.update(len(results.done))
        todo = [record for record in records if record.id not in results.done]
        for index, generation in engine.as_completed(
            [record.prompt for record in todo],
            config,
            sequence_ids=[record.sequence for record in todo],
        ):
            results.write(todo[index].id, generation)
            bar.update()
    return _read(path, records, system.best_of, settings)


def _records(system: SystemSpec, dataset: Dataset, before: Answers | None) -> list[PromptRecord]:
    records = []
    for place, record in enumerate(dataset.records):
        prompt = record.prompt
        if before is not None:
            question = prompt if isinstance(prompt, str) else _last_question(prompt)
            parts = {"question": question, "answer": before.samples[place][0]}
            # Not str.format: texts hold braces too.
            pieces = _PLACES.split(system.template)
            prompt = "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))
        for sample in range(system.best_of):
            record_id = record.id if system.best_of == 1 else f"{record.id}#{sample}"
            sequence = record.sequence * system.best_of + sample
            records.append(PromptRecord(record_id, prompt, sequence))
    return records


_PLACES = re.compile(r"\{(question|answer)\}")


def _last_question(prompt: Any) -> str:
    """Of a chat, what the user said last; token ids cannot be corrected."""
    try:
        return str(next(m["content"] for m in reversed(prompt) if m["role"] == "user"))
    except (TypeError, StopIteration) as error:
        raise ValueError(
            f"{prompt!r} has no question of a user to correct the answer of"
        ) from error


def _read(
    path: Path, records: Sequence[PromptRecord], best_of: int, settings: Mapping[str, Any]
) -> Answers:
    with path.open(encoding="utf-8") as file:
        found = {line["id"]: Generation.from_dict(line) for line in map(json.loads, file)}
    ordered = [found[record.id] for record in records]
    texts = [result.text or "" for result in ordered]
    return Answers(
        samples=tuple(
            tuple(texts[start : start + best_of]) for start in range(0, len(texts), best_of)
        ),
        stats=sum((result.stats for result in ordered), DecodingStats()),
        num_failed=sum(result.error is not None for result in ordered),
        settings=settings,
    )


class _Loader:
    """Engines; a model stays loaded while the systems that follow use it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._placing = {k: self._options.pop(k) for k in ("dtype", "device") if k in options}
        self._source: Any = None
        self._loaded: Any = None
        self._system: SystemSpec | None = None
        self._engine: Engine | None = None

    def engine(self, system: SystemSpec) -> Engine:
        """An engine for a system."""
        if self._engine is not None and self._system == system:
            return self._engine
        self._engine = None
        if self._loaded is None or self._source is not system.model:
            # The old model's memory is free before the new one is loaded.
            self._loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._loaded = (
                load_model(system.model, **{"dtype": "auto", "device": "auto"} | self._placing),
                load_tokenizer(system.model),
            )
            self._source = system.model
        model, tokenizer = self._loaded
        self._system = system
        self._engine = Engine(model, system.agent or False, tokenizer, **self._options)
        return self._engine


def _in_order(systems: Mapping[str, SystemSpec]) -> Iterator[str]:
    """Systems of one model after each other; what is corrected before what corrects it."""
    models: list[Any] = []
    for system in systems.values():
        if not any(system.model is model or system.model == model for model in models):
            models.append(system.model)
    for corrects in (False, True):
        for model in models:
            for name, system in systems.items():
                if system.model == model and (system.corrects is not None) == corrects:
                    yield name


def _name(source: Any) -> Any:
    """Of a model or agent, for the settings of a file."""
    if source is False or source is None or isinstance(source, str):
        return source or False
    if isinstance(source, list | tuple):
        return [_name(one) for one in source]
    return getattr(source, "name_or_path", "") or type(source).__name__
