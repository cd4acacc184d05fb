"""An evaluation from its spec to its report.

answers      of every system to every prompt               files, gone on from
scores       of every answer by every reward               files, gone on from
comparisons  won, tied, lost; rates and how sure they are
report       report.json, report.md, report.html
"""

import dataclasses
import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mara_fast.bench.facts import facts_of
from mara_fast.evaluation import report
from mara_fast.evaluation.answers import Answers, answer_all, answers_path
from mara_fast.evaluation.intervals import bootstrap_interval, sign_test
from mara_fast.evaluation.plan import Plan, make_plan
from mara_fast.evaluation.preference import outcomes
from mara_fast.evaluation.scores import best_of, scores_path, verdicts_path
from mara_fast.evaluation.spec import EvalSpec
from mara_fast.jsonl import forget_results
from mara_fast.loading import choose_device
from mara_fast.options import plain


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often one of two systems is preferred over the other (Eq. 12)."""

    num_won: int
    num_tied: int
    num_lost: int
    rate: float
    """(won - lost) / (won + tied + lost), in [-1, 1]."""
    interval: tuple[float, float]
    """95 %, by the bootstrap over prompts."""
    p_value: float
    """Of the two-sided sign test."""

    @classmethod
    def of(cls, ends: Tensor) -> "Rate":
        """From int64 [N] of 1, 0 and -1."""
        won, tied, lost = (int((ends == value).sum()) for value in (1, 0, -1))
        return cls(
            num_won=won,
            num_tied=tied,
            num_lost=lost,
            rate=(won - lost) / len(ends),
            interval=bootstrap_interval(won, tied, lost),
            p_value=sign_test(won, lost),
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on a data set."""

    ours: str
    theirs: str
    dataset: str
    preference: Rate
    by_reward: Mapping[str, Rate]
    """By each reward alone: helpful, harmless, ..."""
    paper: Mapping[str, float]
    """Rates that the paper prints, in [-1, 1]: ``preference``, and those by reward."""

    @property
    def pair(self) -> str:
        """As the spec writes it."""
        return f"{self.ours} vs {self.theirs}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found."""

    spec: EvalSpec
    reward_names: tuple[str, ...]
    """What being better by each reward is called."""
    limit: int | None
    """Prompts of each data set at most."""
    num_prompts: Mapping[str, tuple[int, int, int]]
    """Prompts evaluated on, unique ones there are, and rows read, by data set."""
    comparisons: tuple[Comparison, ...]
    answers: Mapping[str, Mapping[str, Answers]]
    """By system and data set."""
    mean_scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    """Of the answers given, before weights, by system, data set and reward; None: no opinion."""
    judge_settings: Mapping[str, Any]
    """What scores and verdicts depend on."""
    made: Mapping[str, Any]
    """When, on what, with which versions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for numbers that there are none of."""
        judge = self.spec.judge
        return {
            "name": self.spec.name,
            "made": dict(self.made),
            "judge": {
                "rewards": list(self.reward_names),
                "weights": list(judge.weights),
                "rule": judge.rule,
                "max_length": judge.max_length,
                "settings": dict(self.judge_settings),
            },
            # numpy's numbers and arrays are allowed there.
            "decoding": {
                name: value.tolist() if hasattr(value, "tolist") else value
                for name, value in self.spec.decoding.items()
            },
            "limit": self.limit,
            "num_prompts": {
                name: {"evaluated": evaluated, "unique": unique, "rows": rows}
                for name, (evaluated, unique, rows) in self.num_prompts.items()
            },
            "comparisons": [dataclasses.asdict(one) for one in self.comparisons],
            "systems": {
                system: {
                    dataset: {
                        "mean_scores": self.mean_scores[system][dataset],
                        "num_failed": answers.num_failed,
                        "profile": report.profile(answers.stats),
                        "settings": answers.settings,
                    }
                    for dataset, answers in by_dataset.items()
                }
                for system, by_dataset in self.answers.items()
            },
            "notes": list(self.spec.notes),
        }


def evaluate(
    spec: EvalSpec | Mapping[str, Any] | Path | str,
    output: Path | str,
    *,
    paths: Mapping[str, str] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    work: Path | str | None = None,
) -> Evaluation:
    """Answers, judges, compares and reports; a stopped run goes on where it was.

    Args:
        spec: an :class:`EvalSpec`, its plain values, or a YAML file of them.
        output: folder of the report, and of answers and scores.
        paths: names of models and files, over those of the spec.
        limit: so many prompts of each data set; None: all.
        overwrite: forget the answers and scores that are there.
        work: folder of answers and scores, which several evaluations may share: systems of one
            name are then one system. None: the output.

    Raises:
        ValueError: before any work, naming what was given and what is allowed; results in the
            folder that were made with other settings.
        FileNotFoundError: no such file or folder.
    """
    if isinstance(spec, str | Path):
        spec = EvalSpec.read(Path(spec), paths=paths)
    elif not isinstance(spec, EvalSpec):
        spec = EvalSpec.from_dict(spec, paths=paths)
    elif paths is not None:
        raise ValueError(
            f"paths={dict(paths)!r} has no effect on an EvalSpec; EvalSpec.from_dict takes paths"
        )
    limit = plain(limit)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit!r} is not allowed; allowed: an integer >= 1")
    folder = Path(output)
    place = folder if work is None else Path(work)
    plan = make_plan(spec, limit=limit, folders=(folder, place))
    if overwrite:
        # All at once: a run that is stopped then goes on without the option.
        for path in _files(spec, place):
            forget_results(path)
    answers = answer_all(spec, plan, place)
    # Language models make room for reward models.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    evaluation = _judged(plan, answers, place, limit)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(report.markdown(evaluation), encoding="utf-8")
    (folder / "report.html").write_text(report.page(evaluation), encoding="utf-8")
    return evaluation


def _files(spec: EvalSpec, folder: Path) -> Iterator[Path]:
    """Of answers, scores and verdicts."""
    for dataset in spec.datasets:
        for system in spec.systems:
            yield answers_path(folder, system, dataset)
            yield scores_path(folder, system, dataset)
        for pair in spec.comparisons:
            yield verdicts_path(folder, pair, dataset)


def _judged(
    plan: Plan, answers: Mapping[str, Mapping[str, Answers]], folder: Path, limit: int | None
) -> Evaluation:
    spec, judge, datasets = plan.spec, plan.judge, plan.datasets
    given: dict[tuple[str, str], tuple[str, ...]] = {}
    scores: dict[tuple[str, str], Tensor] = {}
    means: dict[str, dict[str, dict[str, float | None]]] = {}
    for system, by_dataset in answers.items():
        means[system] = {}
        for dataset in datasets:
            found = by_dataset[dataset.name]
            chosen = torch.zeros(len(dataset.records), dtype=torch.int64)
            means[system][dataset.name] = {}
            if spec.judge.rewards:
                table = judge.scores(system, dataset, found.samples, folder)
                chosen = best_of(table, spec.judge.weights)
                table = table.gather(2, chosen.expand(len(table), -1)[..., None])[..., 0]
                scores[system, dataset.name] = table
                means[system][dataset.name] = {
                    name: None if row.isnan().all() else float(row.nanmean())
                    for name, row in zip(judge.names, table, strict=True)
                }
            given[system, dataset.name] = tuple(
                texts[place] for texts, place in zip(found.samples, chosen.tolist(), strict=True)
            )
    comparisons = []
    for ours, theirs in spec.comparisons:
        for dataset in datasets:
            name = dataset.name
            printed = spec.paper.get(f"{ours} vs {theirs}", {}).get(name, {})
            one, other = scores.get((ours, name)), scores.get((theirs, name))
            if spec.judge.rule == "verdict":
                texts = given[ours, name], given[theirs, name]
                ends = judge.verdicts((ours, theirs), dataset, *texts, folder)
            else:
                assert one is not None and other is not None
                ends = _ends(one, other, spec)
            by_reward = {}
            if one is not None and other is not None:
                for index, label in enumerate(judge.names):
                    weight = [spec.judge.weights[index]]
                    alone = outcomes(one[index : index + 1], other[index : index + 1], weight)
                    by_reward[label] = Rate.of(alone)
            comparisons.append(
                Comparison(
                    ours=ours,
                    theirs=theirs,
                    dataset=name,
                    preference=Rate.of(ends),
                    by_reward=by_reward,
                    paper={label: rate / 100 for label, rate in printed.items()},
                )
            )
    device = choose_device(spec.engine.get("device", "auto"))
    first = next(iter(answers.values()))[datasets[0].name]
    # A checkpoint may not say what it is.
    dtype = getattr(torch, first.settings["dtype"].removeprefix("torch."), torch.float32)
    return Evaluation(
        spec=spec,
        reward_names=judge.names,
        limit=limit,
        judge_settings=judge.settings,
        num_prompts={
            one.name: (len(one.records), one.num_unique, one.num_rows) for one in datasets
        },
        comparisons=tuple(comparisons),
        answers=answers,
        mean_scores=means,
        made=facts_of(device, dtype, "transformers"),
    )


def _ends(ours: Tensor, theirs: Tensor, spec: EvalSpec) -> Tensor:
    if spec.judge.rule == "all":
        return outcomes(ours, theirs, spec.judge.weights)
    weights = torch.tensor(spec.judge.weights, dtype=torch.float64)[:, None]
    # One without an opinion on either answer abstains from the pair.
    total = (weights * (ours - theirs)).nansum(0, keepdim=True)
    return outcomes(total, torch.zeros_like(total), [1.0])
