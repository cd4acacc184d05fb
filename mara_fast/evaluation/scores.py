"""What the judge says of every answer, in files that a stopped run goes on from.

    <folder>/scores/<system>/<data set>.jsonl        {"id", "prompt": [prompt, answer], "scores"}
    <folder>/verdicts/<a> vs <b>/<data set>.jsonl    {"id", "prompt": [prompt, a, b], "verdict"}

Shapes: N prompts, M samples of each, R rewards.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mara_fast.evaluation.answers import Answers
from mara_fast.evaluation.datasets import Dataset
from mara_fast.evaluation.spec import JudgeSpec
from mara_fast.jsonl import PromptRecord, ResultFile
from mara_fast.rewards import Rewards
from mara_fast.rewards.functions import function_name
from mara_fast.rewards.named import load_rewards

_CHUNK = 64
"""Answers scored between two writes, in forwards of the judge's batch size."""


class Judge:
    """Scores answers and keeps what it found.

    Args:
        spec: of the judge.
        folder: of the evaluation.
        overwrite: forget the scores that are there.

    Raises:
        ValueError: a reward or verdict that is none.
    """

    def __init__(self, spec: JudgeSpec, folder: Path, *, overwrite: bool) -> None:
        self.spec, self._folder, self._overwrite = spec, folder, overwrite
        self._sources = [_loaded(source) for source in spec.rewards]
        self._verdict = None if spec.verdict is None else _loaded(spec.verdict)
        self._rewards: Rewards | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What being better by each reward is called."""
        return self.spec.names or tuple(self.rewards.names if self._sources else ())

    @property
    def rewards(self) -> Rewards:
        """Loaded when they are first needed: language models come before."""
        if self._rewards is None:
            by_path = any(isinstance(source, str) for source in self._sources)
            options = {"device": self.spec.device, "dtype": self.spec.dtype} if by_path else {}
            self._rewards = Rewards(
                self._sources,
                self.spec.weights,
                batch_size=self.spec.batch_size,
                max_length=self.spec.max_length,
                **options,
            )
        return self._rewards

    def scores(self, system: str, dataset: Dataset, answers: Answers) -> Tensor:
        """Rewards before their weights, float64 [R, N, M]; NaN is no opinion."""
        records = [
            PromptRecord(f"{record.id}#{sample}", [record.prompt, text], 0, record.columns)
            for record, texts in zip(dataset.records, answers.samples, strict=True)
            for sample, text in enumerate(texts)
        ]
        found = self._found(
            self._folder / "scores" / system / f"{dataset.name}.jsonl",
            records,
            {"rewards": [_name(s) for s in self._sources], "max_length": self.spec.max_length},
            holds="scores",
            judge=self._score,
            title=f"scores of {system} on {dataset.name}",
        )
        table = torch.tensor(
            [[math.nan if v is None else v for v in one.values()] for one in found],
            dtype=torch.float64,
        )  # [N M, R]
        return table.T.reshape(table.shape[1], len(dataset.records), -1)

    def verdicts(
        self, pair: tuple[str, str], dataset: Dataset, ours: Sequence[str], theirs: Sequence[str]
    ) -> Tensor:
        """1 where ours is better, -1 where theirs is, else 0; int64 [N]."""
        records = [
            PromptRecord(record.id, [record.prompt, *texts], 0, record.columns)
            for record, *texts in zip(dataset.records, ours, theirs, strict=True)
        ]
        found = self._found(
            self._folder / "verdicts" / " vs ".join(pair) / f"{dataset.name}.jsonl",
            records,
            {"verdict": _name(self._verdict)},
            holds="verdict",
            judge=self._say,
            title=f"verdicts of {' vs '.join(pair)} on {dataset.name}",
        )
        return torch.tensor([(v > 0) - (v < 0) for v in found])

    def _found(
        self,
        path: Path,
        records: Sequence[PromptRecord],
        settings: Mapping[str, Any],
        *,
        holds: str,
        judge: Callable[[Sequence[PromptRecord]], list[Any]],
        title: str,
    ) -> list[Any]:
        """What the judge says of the records, by a file or anew."""
        with ResultFile(
            path, records=records, settings=settings, overwrite=self._overwrite, holds=holds
        ) as results:
            todo = [record for record in records if record.id not in results.done]
            with tqdm(
                total=len(records), initial=len(records) - len(todo), desc=title, leave=False
            ) as bar:
                for start in range(0, len(todo), _CHUNK):
                    chunk = todo[start : start + _CHUNK]
                    for record, value in zip(chunk, judge(chunk), strict=True):
                        results.append(record.id, {"prompt": record.prompt, holds: value})
                    bar.update(len(chunk))
        with path.open(encoding="utf-8") as file:
            found = {line["id"]: line[holds] for line in map(json.loads, file)}
        return [found[record.id] for record in records]

    def _score(self, records: Sequence[PromptRecord]) -> list[dict[str, float | None]]:
        prompts, texts = zip(*(record.prompt for record in records), strict=True)
        columns: dict[str, Any] = _columns(records)
        scores = self.rewards.score(list(prompts), list(texts), **columns).by_name
        return [
            {name: _plain(values[place]) for name, values in scores.items()}
            for place in range(len(records))
        ]

    def _say(self, records: Sequence[PromptRecord]) -> list[float]:
        prompts, ours, theirs = zip(*(record.prompt for record in records), strict=True)
        assert self._verdict is not None
        said = list(self._verdict(list(prompts), list(ours), list(theirs)))
        if len(said) != len(records):
            raise ValueError(
                f"the verdict {_name(self._verdict)} gave {len(said)} values for {len(records)} "
                "pairs; one to each is expected"
            )
        values = [0.0 if value is None else value for value in said]
        for value in values:
            if not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(
                    f"the verdict {_name(self._verdict)} gave {value!r}; expected numbers or None"
                )
        return [float((value > 0) - (value < 0)) for value in values]


def best_of(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Which sample of each prompt has the highest Σ weight · reward; the first of equals.

    Args:
        scores: float64 [R, N, M].
        weights: R numbers.

    Returns:
        int64 [N]
    """
    total = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * scores).nansum(0)
    # max() promises no order among equals.
    return (total == total.max(-1, keepdim=True).values).int().argmax(-1)


def _columns(records: Sequence[PromptRecord]) -> dict[str, list[Any]]:
    """What every record has beside its prompt, for reward functions."""
    shared = set.intersection(*(set(record.columns) for record in records))
    return {name: [record.columns[name] for record in records] for name in sorted(shared)}


def _plain(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _loaded(source: Any) -> Any:
    return load_rewards([source])[0] if isinstance(source, str) else source


def _name(source: Any) -> str:
    if isinstance(source, str):
        return source
    return getattr(source, "name", None) or function_name(source)
