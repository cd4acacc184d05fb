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
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from torch import nn

from mara_fast.agent import MaraAgent
from mara_fast.config import DecodingConfig
from mara_fast.options import check, from_yaml, is_int, is_number, known_options, plain, several
from mara_fast.tiny import AGENT_PATH

TINY_HALVES: dict[str, bool | None] = {"tiny": None, "tiny/benign": False, "tiny/harmful": True}
"""The instructions of the tiny world by name: all, those that are harmful or those that are not."""
TINY_PATHS = {
    "tiny/agent": str(AGENT_PATH),
    "tiny/reward": str(AGENT_PATH.parent / "reward"),
    "tiny/cost": str(AGENT_PATH.parent / "cost"),
}
"""Names of what comes with the package."""

ALIGNER_TEMPLATE = (
    "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more "
    "helpful and harmless: {question} | {answer} ASSISTANT:"
)
"""How the Aligner reads what it corrects (Ji et al. 2024)."""

PREFERENCE = "preference"
"""What the paper's rates of a comparison are under, beside those by reward."""

Rule = Literal["all", "sum", "verdict"]
PRESETS = ("paper", "official")
MAX_SAMPLES = 10_000
"""Of ``best_of``."""
_NAME = re.compile(r"[\w.,+%() -]+")
_PLACES = re.compile(r"\{(question|answer)\}")


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """One way to answer."""

    model: Any = "tiny"
    """Hub id, path, ``tiny``, or a loaded model."""
    agent: Any = False
    """Path, hub id or :class:`MaraAgent`, or a list of them; False: plain decoding."""
    preset: str | None = None
    """``paper`` or ``official`` decoding; None: the agent's own, else the defaults."""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Options of :class:`DecodingConfig`, over the preset's and those of all systems."""
    best_of: int = 1
    """Answers sampled per prompt, of which the one of highest reward is given."""
    corrects: str | None = None
    """Name of another system, whose answers this model is asked to edit (Aligner)."""
    template: str = ALIGNER_TEMPLATE
    """What it reads, with ``{question}`` and ``{answer}``."""

    def __post_init__(self) -> None:
        for name in ("model", "agent"):
            object.__setattr__(self, name, _text_of_path(getattr(self, name)))
        object.__setattr__(self, "best_of", plain(self.best_of))
        if not isinstance(self.model, str | nn.Module) or self.model == "":
            raise ValueError(
                f"model={self.model!r} is not allowed; allowed: a hub id, a path, 'tiny', or a "
                "loaded model"
            )
        agents = self.agent if isinstance(self.agent, list | tuple) else [self.agent or "none"]
        if not agents or not all(one and isinstance(one, str | MaraAgent) for one in agents):
            raise ValueError(
                f"agent={self.agent!r} is not allowed; allowed: a path, a hub id, a MaraAgent, a "
                "list of these, or False"
            )
        check(
            "best_of",
            self.best_of,
            is_int,
            f"an integer from 1 to {MAX_SAMPLES}",
            minimum=1,
            maximum=MAX_SAMPLES,
        )
        if self.preset not in (None, *PRESETS):
            raise ValueError(
                f"preset={self.preset!r} is not known; allowed: {', '.join(PRESETS)} or none"
            )
        known_options(DecodingConfig, self.decoding)
        if self.best_of > 1 and self.decoding.get("acceptance", "sample") != "sample":
            raise ValueError(
                f"best_of={self.best_of} with acceptance={self.decoding['acceptance']!r} is not "
                "allowed: all answers to a prompt would be the same"
            )
        for name in ("corrects", "template"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: a text")
        if self.corrects is not None and self.best_of > 1:
            raise ValueError("a system has best_of or corrects, not both")
        for part in ("{question}", "{answer}"):
            if part not in (self.template or ""):
                raise ValueError(f"template={self.template!r} lacks {part}")
        if self.corrects is None and self.template != ALIGNER_TEMPLATE:
            warnings.warn(
                f"template={self.template!r} has no effect: the system corrects no other",
                stacklevel=2,
            )

    def asked(self, prompt: Any, answer: str) -> str:
        """What the model reads to correct an answer.

        Raises:
            ValueError: a prompt that has no question.
        """
        parts = {"question": _question(prompt), "answer": answer}
        # Not str.format: texts hold braces too.
        pieces = _PLACES.split(self.template)
        return "".join(parts[one] if i % 2 else one for i, one in enumerate(pieces))

    def config(self, shared: Mapping[str, Any], agent_defaults: DecodingConfig) -> DecodingConfig:
        """The decoding options in force.

        Args:
            shared: options of all systems.
            agent_defaults: the agent's own, else ours.
        """
        if self.preset is not None:
            agent_defaults = getattr(DecodingConfig, self.preset)()
        options = dict(shared)
        if self.best_of > 1:
            options["acceptance"] = "sample"
        if self.corrects is not None:
            options["prompt_format"] = "raw"
        return agent_defaults.replace(**options | dict(self.decoding))


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
        object.__setattr__(self, "path", _text_of_path(self.path))
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
class JudgeSpec:
    """Who says which answer is better.

    rule "all"      won where every reward is better, lost where every one is worse, else tied
    rule "sum"      the sign of the difference of Σ weight · reward
    rule "verdict"  what ``verdict`` says

    A reward that has no opinion on one of two answers abstains from the pair.
    """

    rewards: tuple[Any, ...] = ()
    """Hub ids or paths of reward models, ``module:function``, or callables."""
    weights: tuple[float, ...] = ()
    """One to each reward, negative for costs; all 1 if none are given."""
    names: tuple[str, ...] = ()
    """What being better by each reward is called; the rewards' own names if none are given."""
    rule: Rule = "all"
    verdict: Any = None
    """``module:function`` or a callable ``f(prompts, ours, theirs) -> list``: positive where ours
    is better, negative where theirs is, 0 or None where neither: an LLM as judge, a human."""
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    """Tokens of a text that models read at most."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("rewards", "weights", "names"):
            kind, value = str if name != "weights" else float, getattr(self, name)
            object.__setattr__(self, name, () if value is None else several(value, kind))
        object.__setattr__(self, "rewards", tuple(map(_text_of_path, self.rewards)))
        object.__setattr__(self, "weights", tuple(map(plain, self.weights)))
        for index, reward in enumerate(self.rewards):
            # A RewardModel is no callable, but scores.
            if not (isinstance(reward, str) or callable(reward) or hasattr(reward, "score")):
                raise ValueError(
                    f"judge.rewards[{index}]={reward!r} is not allowed; allowed: a hub id, a path, "
                    "module:function, a loaded model, or a callable"
                )
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"judge.names: {name!r} is not allowed; allowed: texts")
        if not (self.verdict is None or isinstance(self.verdict, str) or callable(self.verdict)):
            raise ValueError(
                f"judge.verdict={self.verdict!r} is not allowed; allowed: module:function, or a "
                "callable"
            )
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.rewards))
        for weight in self.weights:
            check("judge.weights", weight, is_number, "finite numbers")
        for name in ("weights", "names"):
            values = getattr(self, name)
            if values and len(values) != len(self.rewards):
                raise ValueError(
                    f"judge.{name}={list(values)!r} are {len(values)} for {len(self.rewards)} "
                    "rewards; one to each is expected"
                )
        if self.rewards and not any(self.weights):
            raise ValueError(
                f"judge.weights={list(self.weights)!r} are not allowed: no reward would count"
            )
        if self.rule not in get_args(Rule):
            raise ValueError(
                f"judge.rule={self.rule!r} is not known; allowed: {', '.join(get_args(Rule))}"
            )
        if (self.rule == "verdict") != (self.verdict is not None):
            raise ValueError("judge.rule 'verdict' and judge.verdict go together")
        if not self.rewards and self.verdict is None:
            raise ValueError("judge.rewards is empty: at least one reward, or a verdict, is needed")
        check("judge.batch_size", self.batch_size, is_int, "an integer >= 1", minimum=1)
        if self.max_length is not None:
            check("judge.max_length", self.max_length, is_int, "an integer >= 1", minimum=1)


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


def _text_of_path(value: Any) -> Any:
    """Paths as texts, also in a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_text_of_path(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _question(prompt: Any) -> str:
    """Of a chat, what the user said last; token ids cannot be corrected."""
    if isinstance(prompt, str):
        return prompt
    try:
        return str(next(m["content"] for m in reversed(prompt) if m["role"] == "user"))
    except (TypeError, StopIteration) as error:
        raise ValueError(
            f"{prompt!r} has no question of a user to correct the answer of"
        ) from error


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
