"""Answers of every system to every prompt, in files that a stopped run goes on from.

<folder>/answers/<system>/<data set>.jsonl       a line per sample, as mara-fast generate writes
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mara_fast.engine import Engine
from mara_fast.evaluation.datasets import Dataset
from mara_fast.evaluation.plan import Plan
from mara_fast.evaluation.spec import EvalSpec
from mara_fast.evaluation.system import SystemSpec
from mara_fast.jsonl import PromptRecord, ResultFile, read_results
from mara_fast.loading import load_model, load_tokenizer
from mara_fast.outputs import DecodingStats, Generation
from mara_fast.prompts import PromptError


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


def answer_all(spec: EvalSpec, plan: Plan, folder: Path) -> dict[str, dict[str, Answers]]:
    """Answers by system and data set.

    Args:
        spec: of the evaluation.
        plan: what is to be done.
        folder: of answers and scores.
    """
    found: dict[str, dict[str, Answers]] = {}
    loader = _Loader(spec.engine)
    total = sum(
        len(dataset.records) * system.best_of
        for dataset in plan.datasets
        for system in spec.systems.values()
    )
    with tqdm(total=total, unit="answer") as bar:
        for name in _in_order(spec.systems):
            found[name] = {}
            for dataset in plan.datasets:
                bar.set_description(f"{name} on {dataset.name}")
                found[name][dataset.name] = _answer(
                    spec.systems[name], name, plan, dataset, found, loader, folder, bar
                )
    return {name: found[name] for name in spec.systems}


def answers_path(folder: Path, system: str, dataset: str) -> Path:
    """File of a system's answers."""
    return folder / "answers" / system / f"{dataset}.jsonl"


def _answer(
    system: SystemSpec,
    name: str,
    plan: Plan,
    dataset: Dataset,
    found: Mapping[str, Mapping[str, Answers]],
    loader: "_Loader",
    folder: Path,
    bar: Any,
) -> Answers:
    before = None if system.corrects is None else found[system.corrects][dataset.name]
    records = _records(system, dataset, before)
    settings = plan.settings(name, None if before is None else before.settings)
    path = answers_path(folder, name, dataset.name)
    with ResultFile(path, records=records, settings=settings) as results:
        bar.update(len(results.done))
        todo = [record for record in records if record.id not in results.done]
        # Nothing is loaded for what is there.
        if todo:
            engine = loader.engine(system)
            try:
                run = engine.as_completed(
                    [record.prompt for record in todo],
                    plan.configs[name],
                    sequence_ids=[record.sequence for record in todo],
                )
            # Of what corrects: how long an answer would be was not known before.
            except PromptError as error:
                place = dataset.place(todo[error.index])
                raise ValueError(f"{place}{error.problem} (systems.{name})") from error
            for index, generation in run:
                results.write(todo[index].id, generation)
                bar.update()
    return _read(path, records, system.best_of, settings)


def _records(system: SystemSpec, dataset: Dataset, before: Answers | None) -> list[PromptRecord]:
    records = []
    for place, record in enumerate(dataset.records):
        prompt = record.prompt
        if before is not None:
            prompt = system.asked(prompt, before.samples[place][0])
        for sample in range(system.best_of):
            record_id = record.id if system.best_of == 1 else f"{record.id}#{sample}"
            sequence = record.sequence * system.best_of + sample
            records.append(PromptRecord(record_id, prompt, sequence, where=record.where))
    return records


def _read(
    path: Path, records: Sequence[PromptRecord], best_of: int, settings: Mapping[str, Any]
) -> Answers:
    found = read_results(path, Generation.from_dict)
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
        if self._loaded is None or not _is_same(self._source, system.model):
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
        if not any(_is_same(system.model, model) for model in models):
            models.append(system.model)
    for corrects in (False, True):
        for model in models:
            for name, system in systems.items():
                if _is_same(system.model, model) and (system.corrects is not None) == corrects:
                    yield name


def _is_same(one: Any, other: Any) -> bool:
    """Names by their text, loaded models by themselves."""
    return one is other or (isinstance(one, str) and one == other)
