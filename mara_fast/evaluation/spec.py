"""What an evaluation is made of: systems, data sets, a judge, and who is compared with whom.

name:         tiny
paths:        {llama: org/Llama, agent: ../my-agent}     names used below for models and files
datasets:     {held-out: tiny, mine: {path: prompts.jsonl}}
systems:      {base: {model: llama}, mara: {model: llama, agent: agent}}
comparisons:  [mara vs base]
judge:        {rewards: [org/reward, org/cost], weights: [1, -1], names: [helpful, harmless]}
decoding:     {max_new_tokens: 512}                      of all systems
engine:       {max_batch_size: 64}
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mara_fast.config import DecodingConfig
from mara_fast.evaluation.datasets import DatasetSpec
from mara_fast.evaluation.judge import JudgeSpec
from mara_fast.evaluation.system import SystemSpec
from mara_fast.options import check, from_yaml, is_number, known_options, plain, several
from mara_fast.tiny import AGENT_PATH

TINY_PATHS = {
    "tiny/agent": str(AGENT_PATH),
    "tiny/reward": str(AGENT_PATH.parent / "reward"),
    "tiny/cost": str(AGENT_PATH.parent / "cost"),
}
"""Names of what comes with the package."""

PREFERENCE = "preference"
"""What the paper's rates of a comparison are under, beside those by reward."""

_NAME = re.compile(r"[\w.,+%() -]+")


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """An evaluation."""

    name: str
    systems: Mapping[str, SystemSpec]
    datasets: Mapping[str, DatasetSpec]
    comparisons: tuple[tuple[str, str], ...]
    """Pairs of systems: how often the first is preferred over the second."""
    judge: JudgeSpec
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Options of all systems."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Options of :class:`mara_fast.Engine`: max_batch_size, dtype, device, compile, ..."""
    paper: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Rates that the paper prints, in percent, by comparison and data set: ``preference``, and
    those by reward. In a file a number alone is the preference rate."""
    notes: tuple[str, ...] = ()
    """Printed below the tables."""

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, paths: Mapping[str, str] | None = None
    ) -> Self:
        """A spec from plain values (YAML, JSON) or objects.

        Args:
            values: as the YAML at the top.
            paths: names of models and files, over those of the spec.

        Raises:
            ValueError: naming what is unknown, missing or not allowed, and where.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a spec must be a mapping of names to values, got {values!r}")
        values = dict(values)
        known = _mapping("paths", values.pop("paths", {}))
        unused = set(paths or {}) - set(known)
        if unused:
            raise ValueError(
                f"the spec has no path named {', '.join(sorted(unused))}; it has "
                f"{', '.join(known) or 'none'}"
            )
        places = TINY_PATHS | {k: str(v) for k, v in (known | dict(paths or {})).items()}
        _only("the spec", ["paths", *(f.name for f in dataclasses.fields(cls))], values)
        missing = [n for n in ("systems", "datasets", "comparisons", "judge") if not values.get(n)]
        if missing:
            raise ValueError(f"the spec lacks {', '.join(missing)}")

        def placed(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [placed(one) for one in value]
            return places.get(value, value) if isinstance(value, str) else value

        systems, datasets = {}, {}
        for name, system in _mapping("systems", values["systems"]).items():
            options = _mapping(f"systems.{name}", system)
            options |= {k: placed(options[k]) for k in ("model", "agent") if k in options}
            systems[name] = _record(SystemSpec, f"systems.{name}", options)
        for name, dataset in _mapping("datasets", values["datasets"]).items():
            options = {"path": dataset} if isinstance(dataset, str) else dataset
            options = _mapping(f"datasets.{name}", options)
            options |= {k: placed(options[k]) for k in ("path", "hub") if k in options}
            datasets[name] = _record(DatasetSpec, f"datasets.{name}", options)
        judge = _mapping("judge", values["judge"])
        if judge.get("rewards") is not None:
            judge["rewards"] = placed(several(judge["rewards"], str))
        return cls(
            name=str(values.get("name", "evaluation")),
            systems=systems,
            datasets=datasets,
            comparisons=tuple(_pair(one) for one in several(values["comparisons"], str)),
            judge=_record(JudgeSpec, "judge", judge),
            decoding=_mapping("decoding", values.get("decoding", {})),
            engine={k: plain(v) for k, v in _mapping("engine", values.get("engine", {})).items()},
            paper={
                pair: {
                    dataset: _printed(f"paper.{pair}.{dataset}", rates)
                    for dataset, rates in _mapping(f"paper.{pair}", by_dataset).items()
                }
                for pair, by_dataset in _mapping("paper", values.get("paper", {})).items()
            },
            notes=tuple(map(str, several(values.get("notes", ()), str))),
        )

    @classmethod
    def read(cls, path: Path, *, paths: Mapping[str, str] | None = None) -> Self:
        """A spec from a YAML file. Paths in it are seen from the folder of the command.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see :meth:`from_dict`.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        try:
            return cls.from_dict(from_yaml(path.read_text(encoding="utf-8")), paths=paths)
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __post_init__(self) -> None:
        for kind, names in (("system", self.systems), ("data set", self.datasets)):
            for name in names:
                if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("."):
                    raise ValueError(
                        f"{name!r} is no name for a {kind}; allowed: letters, digits, spaces "
                        "and .,_+-%(), as it names files"
                    )
                if name != name.strip() or " vs " in name:
                    raise ValueError(
                        f"{name!r} is no name for a {kind}: it has a space at an end, or ' vs '"
                    )
        for pair in self.comparisons:
            for name in pair:
                if name not in self.systems:
                    raise ValueError(
                        f"comparison {' vs '.join(pair)!r} names {name!r}, which is no system; "
                        f"there are {', '.join(self.systems)}"
                    )
            if pair[0] == pair[1]:
                raise ValueError(f"comparison {' vs '.join(pair)!r} has one system only")
        for name, system in self.systems.items():
            other = system.corrects
            if other is None:
                continue
            if other not in self.systems or other == name:
                raise ValueError(
                    f"systems.{name}.corrects={other!r} is not allowed; allowed: another system"
                )
            if self.systems[other].corrects is not None or self.systems[other].best_of > 1:
                raise ValueError(
                    f"systems.{name}.corrects={other!r} is not allowed: it answers by correcting, "
                    "or by choosing the best of several"
                )
        if any(system.best_of > 1 for system in self.systems.values()) and not self.judge.rewards:
            raise ValueError("best_of chooses by judge.rewards, and there are none")
        known_options(DecodingConfig, self.decoding)
        _only("engine", _ENGINE_OPTIONS, self.engine)
        pairs = {" vs ".join(pair) for pair in self.comparisons}
        for name, rates in self.paper.items():
            unknown = ({name} - pairs) | (set(rates) - set(self.datasets))
            if unknown:
                raise ValueError(f"paper names {', '.join(map(repr, unknown))}, which is not here")


_ENGINE_OPTIONS = (
    "max_batch_size",
    "max_length",
    "prefill_chunk",
    "dtype",
    "device",
    "memory_utilization",
    "attention",
    "cuda_graph",
    "compile",
)


def _pair(value: Any) -> tuple[str, str]:
    parts = value.split(" vs ") if isinstance(value, str) else value
    if (
        not isinstance(parts, Sequence)
        or len(parts) != 2
        or not all(isinstance(part, str) for part in parts)
    ):
        raise ValueError(f"comparison {value!r} is not allowed; expected 'one vs another'")
    return parts[0].strip(), parts[1].strip()


def _printed(name: str, value: Any) -> dict[str, float]:
    """Rates of the paper, in percent."""
    value = plain(value)
    rates = _mapping(name, {PREFERENCE: value} if is_number(value) else value)
    rates = {label: plain(rate) for label, rate in rates.items()}
    for rate in rates.values():
        check(name, rate, is_number, "percentages", minimum=-100, maximum=100)
    return rates


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping of names to values, got {value!r}")
    return {str(key): one for key, one in value.items()}


def _only(where: str, allowed: Sequence[str], given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ValueError(
            f"{where} has the unknown option {unknown[0]!r}; allowed: {', '.join(allowed)}"
        )


def _record(kind: Any, where: str, options: Mapping[str, Any]) -> Any:
    try:
        return kind(**known_options(kind, options))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
