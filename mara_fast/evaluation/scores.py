"""What the judge says of every answer, in files that a stopped run goes on from.

    <folder>/scores/<system>/<data set>.jsonl      {"id", "prompt": [prompt, answer, columns],
                                                   "scores"}
    <folder>/verdicts/<a> vs <b>/<data set>.jsonl  {"id", "prompt": [prompt, a, b], "verdict"}

Shapes: N prompts, M samples of each, R rewards.
"""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mara_fast.evaluation.datasets import Dataset
from mara_fast.evaluation.fingerprint import Fingerprints
from mara_fast.evaluation.judge import JudgeSpec
from mara_fast.jsonl import PromptRecord, ResultFile, read_results
from mara_fast.loading import choose_device, choose_dtype, named
from mara_fast.prompts import is_chat
from mara_fast.rewards import RewardModel, Rewards
from mara_fast.rewards.functions import call_functions, function_name
from mara_fast.rewards.named import load_rewards

_CHUNK = 64
"""Answers scored between two writes, in forwards of the judge's batch size."""
_RESERVED = ("prompts", "completions", "progress", "self")
"""What rewards are called with beside columns."""


class Judge:
    """Scores answers and keeps what it found. Models are loaded when something is to be scored.

    Args:
        spec: of the judge.
        fingerprints: for the settings of what it found.

    Raises:
        ValueError: a reward or verdict that is none, names that occur twice, a device or dtype
            that is not known.
        OSError: no such folder or hub id.
    """

    def __init__(self, spec: JudgeSpec, fingerprints: Fingerprints) -> None:
        from transformers.utils import cached_file

        self.spec, self._fingerprints = spec, fingerprints
        self._sources = [_loaded(source) for source in spec.rewards]
        self._verdict = None if spec.verdict is None else _loaded(spec.verdict)
        if self._verdict is not None:
            _check_verdict(self._verdict)
        self._paths = [source for source in self._sources if isinstance(source, str)]
        for path in self._paths:
            if os.path.exists(path) and not os.path.isfile(os.path.join(path, "config.json")):
                raise ValueError(f"judge.rewards: {path!r} is not the folder of a model")
            with named("reward", path):
                # Of a hub id, too: found missing here and not when all is answered.
                cached_file(path, "config.json")
        self._dtype = self._placing()
        # What can be wrong with rewards that are loaded already is said now.
        ready = [source for source in self._sources if not isinstance(source, str)]
        self._ready = Rewards(ready, max_length=spec.max_length) if ready else None
        self._rewards: Rewards | None = None
        self.names = spec.names or _names(self._sources)
        """What being better by each reward is called."""
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"judge.names={list(self.names)!r} has {name!r} twice")

    @property
    def rewards(self) -> Rewards:
        """All of them, loaded."""
        if self._rewards is None:
            placing = {"device": self.spec.device, "dtype": self.spec.dtype} if self._paths else {}
            # The last one has an opinion on every sample, and no weight: there may be no other.
            self._rewards = Rewards(
                [*self._sources, _indifferent],
                [*self.spec.weights, 0.0],
                batch_size=self.spec.batch_size,
                max_length=self.spec.max_length,
                **placing,
            )
        return self._rewards

    def check(self, datasets: Sequence[Dataset]) -> None:
        """Raises a ValueError for prompts and columns that the rewards do not take."""
        for dataset in datasets:
            for record in dataset.records if self._sources else ():
                if not (isinstance(record.prompt, str) or is_chat(record.prompt)):
                    raise ValueError(
                        f"{dataset.place(record)} is token ids; rewards read texts and chats"
                    )
            try:
                if self._ready is not None:
                    self._ready.check_columns(self._columns(dataset))
            except ValueError as error:
                raise ValueError(f"data set {dataset.name}: {error}") from error

    def scores(
        self, system: str, dataset: Dataset, samples: Sequence[Sequence[str]], folder: Path
    ) -> Tensor:
        """Rewards before their weights, float64 [R, N, M]; NaN is no opinion.

        Args:
            system: by name.
            dataset: whose prompts were answered.
            samples: answers to each prompt, M texts.
            folder: of answers and scores.
        """
        columns = self._columns(dataset)
        # What the rewards see of a sample.
        records = [
            PromptRecord(f"{record.id}#{sample}", [record.prompt, text, seen], 0)
            for record, texts in zip(dataset.records, samples, strict=True)
            for seen in ({name: record.columns[name] for name in columns},)
            for sample, text in enumerate(texts)
        ]
        found = self._found(
            scores_path(folder, system, dataset.name),
            records,
            self._score_settings(),
            holds="scores",
            parse=self._read_scores,
            judge=self._score,
            title=f"scores of {system} on {dataset.name}",
        )
        table = torch.tensor(found, dtype=torch.float64)  # [N M, R]
        return table.T.reshape(table.shape[1], len(dataset.records), -1)

    def verdicts(
        self,
        pair: tuple[str, str],
        dataset: Dataset,
        ours: Sequence[str],
        theirs: Sequence[str],
        folder: Path,
    ) -> Tensor:
        """1 where ours is better, -1 where theirs is, else 0; int64 [N]."""
        records = [
            PromptRecord(record.id, [record.prompt, *texts], 0)
            for record, *texts in zip(dataset.records, ours, theirs, strict=True)
        ]
        found = self._found(
            verdicts_path(folder, pair, dataset.name),
            records,
            self._verdict_settings(),
            holds="verdict",
            parse=lambda line: _sign(float(line["verdict"])),
            judge=self._say,
            title=f"verdicts of {' vs '.join(pair)} on {dataset.name}",
        )
        return torch.tensor(found).long()

    @property
    def settings(self) -> dict[str, Any]:
        """What scores and verdicts depend on."""
        return self._score_settings() | self._verdict_settings()

    def _score_settings(self) -> dict[str, Any]:
        return {
            "rewards": self._fingerprints.of(self._sources),
            "max_length": self.spec.max_length,
            "dtype": self._dtype,
        }

    def _verdict_settings(self) -> dict[str, Any]:
        return {"verdict": self._fingerprints.of(self._verdict)}

    def _placing(self) -> str | None:
        """The dtype of models that are loaded here."""
        has_models = any(not _is_function(source) for source in self._sources)
        for name, default, matters in (
            ("device", "auto", bool(self._paths)),
            ("dtype", "auto", bool(self._paths)),
            ("max_length", None, has_models),
        ):
            value = getattr(self.spec, name)
            if not matters and value != default:
                warnings.warn(
                    f"judge.{name}={value!r} has no effect on rewards that are no models, or are "
                    "loaded already",
                    stacklevel=2,
                )
        try:
            dtype = choose_dtype(self.spec.dtype, choose_device(self.spec.device))
        except ValueError as error:
            raise ValueError(f"judge: {error}") from error
        return str(dtype) if self._paths else None

    def _columns(self, dataset: Dataset) -> list[str]:
        """Names of what every record has beside its prompt, for reward functions."""
        if not any(map(_is_function, self._sources)):
            return []
        shared = set.intersection(*(set(record.columns) for record in dataset.records))
        for name in _RESERVED:
            if name in shared:
                raise ValueError(
                    f"data set {dataset.name} has a column {name!r}, which reward functions cannot "
                    "be given: rename it"
                )
        return sorted(shared)

    def _found(
        self,
        path: Path,
        records: Sequence[PromptRecord],
        settings: Mapping[str, Any],
        *,
        holds: str,
        parse: Callable[[Any], Any],
        judge: Callable[[Sequence[PromptRecord]], list[Any]],
        title: str,
    ) -> list[Any]:
        """What the judge says of the records, by a file or anew."""
        with ResultFile(path, records=records, settings=settings, holds=holds) as results:
            todo = [record for record in records if record.id not in results.done]
            with tqdm(
                total=len(records), initial=len(records) - len(todo), desc=title, leave=False
            ) as bar:
                for start in range(0, len(todo), _CHUNK):
                    chunk = todo[start : start + _CHUNK]
                    for record, value in zip(chunk, judge(chunk), strict=True):
                        results.append(record.id, {"prompt": record.prompt, holds: value})
                    bar.update(len(chunk))
        found = read_results(path, parse)
        return [found[record.id] for record in records]

    def _score(self, records: Sequence[PromptRecord]) -> list[dict[str, float | None]]:
        prompts, texts, seen = map(list, zip(*(record.prompt for record in records), strict=True))
        columns: dict[str, Any] = {name: [one[name] for one in seen] for name in seen[0]}
        scores = self.rewards.score(prompts, texts, **columns).by_name
        del scores[self.rewards.names[-1]]
        return [
            {name: _plain(values[place]) for name, values in scores.items()}
            for place in range(len(records))
        ]

    def _read_scores(self, line: Mapping[str, Any]) -> list[float]:
        values = [math.nan if v is None else float(v) for v in line["scores"].values()]
        if len(values) != len(self._sources):
            raise ValueError(f"{len(values)} scores of {len(self._sources)} rewards")
        return values

    def _say(self, records: Sequence[PromptRecord]) -> list[float]:
        arguments = map(list, zip(*(record.prompt for record in records), strict=True))
        assert self._verdict is not None
        name = f"judge.verdict {function_name(self._verdict)}"
        # Positional: what it calls them is its own affair.
        found = call_functions({name: partial(self._verdict, *arguments)}, {}, len(records))
        return [_sign(value) for value in found[name].nan_to_num(0.0).tolist()]


def scores_path(folder: Path, system: str, dataset: str) -> Path:
    """File of the scores of a system's answers."""
    return folder / "scores" / system / f"{dataset}.jsonl"


def verdicts_path(folder: Path, pair: tuple[str, str], dataset: str) -> Path:
    """File of the verdicts on the answers of two systems."""
    return folder / "verdicts" / " vs ".join(pair) / f"{dataset}.jsonl"


def best_of(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Which sample of each prompt has the highest Σ weight · reward; the first of equals.

    A reward that has no opinion on one of the samples abstains from the prompt.

    Args:
        scores: float64 [R, N, M].
        weights: R numbers.

    Returns:
        int64 [N]
    """
    weighted = torch.tensor(weights, dtype=torch.float64)[:, None, None] * scores
    abstains = scores.isnan().any(-1, keepdim=True)  # [R, N, 1]
    total = weighted.masked_fill(abstains, 0.0).sum(0)
    # max() promises no order among equals.
    return (total == total.max(-1, keepdim=True).values).int().argmax(-1)


def _names(sources: Sequence[Any]) -> tuple[str, ...]:
    """As :class:`Rewards` names them, before their models are loaded."""
    found: list[str] = []
    for source in sources:
        if isinstance(source, RewardModel):
            name = source.name
        elif _is_function(source):
            name = function_name(source)
        else:
            path = source if isinstance(source, str) else source.config._name_or_path
            name = PurePath(path).name or type(source).__name__
        number, unused = 2, name
        while unused in found:
            number, unused = number + 1, f"{name}_{number}"
        found.append(unused)
    return tuple(found)


def _is_function(source: Any) -> bool:
    from transformers import PreTrainedModel

    return not isinstance(source, str | RewardModel | PreTrainedModel)


def _check_verdict(verdict: Any) -> None:
    """Raises a ValueError unless it can be called with three lists."""
    if not callable(verdict):
        raise ValueError(f"judge.verdict {verdict!r} is not a function; a model gives no verdict")
    try:
        signature = inspect.signature(verdict)
    # Functions that are written in C may have none.
    except ValueError:
        return
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise ValueError(
            f"judge.verdict {function_name(verdict)} cannot be called with three lists: {error}. "
            "Expected: f(prompts, ours, theirs)"
        ) from error


def _indifferent(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))


def _plain(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _loaded(source: Any) -> Any:
    return load_rewards([source])[0] if isinstance(source, str) else source
