"""A run as a file and a command line describe it: model, rewards, data and options.

options = the file's  <-  key=value ones  <-  flags, the later ones win
config  = the preset with them
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from mara_fast.jsonl import read_prompts
from mara_fast.options import from_yaml, several
from mara_fast.tiny.grammar import instructions
from mara_train.config import SECTIONS, MaraConfig

RECIPE_NAME = "run.yaml"
PRESETS: dict[str, Callable[[], MaraConfig]] = {
    "default": MaraConfig,
    "official": MaraConfig.official,
}
TINY = "tiny"
"""Name of the embedded model, and of the instructions of its world."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is made of. Paths are seen from the folder that the command runs in."""

    model: str
    """Hub id, path or ``tiny``."""
    rewards: tuple[str, ...]
    """Hub ids or paths of reward models, and ``module:function``."""
    train_dataset: str
    """JSONL file of prompts, or ``tiny``."""
    eval_dataset: str | None = None
    """The same, for evaluation; None: no evaluation."""
    agent: str | None = None
    """Folder or hub id of an agent to train further; None: a new one."""
    config: MaraConfig
    """All other options."""

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A recipe from plain values: its own names, ``preset``, and those of the config.

        Raises:
            ValueError: what is unknown, missing or not allowed.
        """
        _check_names(options)
        preset = options.get("preset") or "default"
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not known; allowed: {', '.join(PRESETS)}")
        others = {n: v for n, v in options.items() if n != "preset" and n not in _own_names()}
        config = PRESETS[preset]().replace(**others)
        own = {name: options[name] for name in _own_names() if options.get(name) is not None}
        if "rewards" in own:
            own["rewards"] = several(own["rewards"], str)
        missing = [f"{n} ({flag})" for n, flag in _NEEDED.items() if not own.get(n)]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)}")
        for name, value in own.items():
            texts = value if name == "rewards" else (value,)
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: names and paths")
        return cls(**own, config=config)

    def write(self, folder: Path) -> Path:
        """Writes it out in full, so that it can be resumed from there."""
        text = yaml.safe_dump(self._plain(), sort_keys=False, allow_unicode=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECIPE_NAME
        path.write_text(text, encoding="utf-8")
        return path

    def check_beside(self, folder: Path, *, resume: bool) -> None:
        """Whether this run and the recipe in its folder, if there is one, are the same.

        Raises:
            FileExistsError: a new run would write over another recipe.
            ValueError: a resumed run has another model, agent or rewards.
        """
        path = folder / RECIPE_NAME
        if not path.exists():
            return
        try:
            theirs = from_yaml(path.read_text(encoding="utf-8"))
        except ValueError:
            theirs = None
        mine = self._plain()
        if not resume:
            if theirs != mine:
                raise FileExistsError(
                    f"{path} is there already and has other options, and this run would write over "
                    "it: rename it, or give another --output"
                )
            return
        theirs = theirs if isinstance(theirs, dict) else {}
        for name in ("model", "agent", "rewards"):
            if name in theirs and theirs[name] != mine[name]:
                raise ValueError(
                    f"{name}={mine[name]!r} differs from {theirs[name]!r} in {path}: a resumed run "
                    "goes on with what it has"
                )

    def _plain(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _own_names()}
        own["rewards"] = list(self.rewards)
        return own | self.config.to_dict()


_NEEDED = {"model": "--model", "rewards": "--reward", "train_dataset": "--train-data"}


def read_options(
    path: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a YAML file, of ``key=value`` texts and of flags, merged.

    Args:
        path: of the file; None: there is none.
        assignments: ``sac.gamma=0.9``: a name, with a section's before a dot, and a YAML value.
        flags: by name; those that are None were not given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping, or an assignment is none.
    """
    options: dict[str, Any] = {}
    if path is not None:
        try:
            found = from_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} must hold option: value lines")
        options = _underscored(found)
    for text in assignments:
        key, equals, value = text.partition("=")
        *sections, name = key.strip().replace("-", "_").split(".")
        if not equals or not name or not all(sections):
            raise ValueError(f"{text!r} is no option; expected key=value, as sac.gamma=0.9")
        target = options
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ValueError(f"{text!r}: {section} has no options of its own")
        try:
            target[name] = from_yaml(value)
        except ValueError as error:
            raise ValueError(f"the value of {text!r} is not valid YAML: {error}") from error
    return options | {name: value for name, value in flags.items() if value is not None}


def load_rows(spec: str, *, name: str) -> list[dict[str, Any]]:
    """The rows of a data set, with a ``prompt`` each.

    Args:
        spec: JSONL file, or ``tiny``.
        name: of the option: ``train_dataset``, or ``eval_dataset``, whose tiny instructions are
            the held-out ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than prompts.
    """
    if spec == TINY:
        found = instructions(split="heldout" if name == "eval_dataset" else "train")
        return [{"prompt": instruction.text} for instruction in found]
    if not os.path.isfile(spec):
        raise FileNotFoundError(f"{name}: no file at {spec}; expected a JSONL file, or {TINY}")
    records = read_prompts(Path(spec))
    if not records:
        raise ValueError(f"{name}: {spec} holds no prompts")
    return [{"prompt": record.prompt, **record.columns} for record in records]


def _own_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Recipe) if field.name != "config"]


def _check_names(options: Mapping[str, Any]) -> None:
    config = [field.name for field in dataclasses.fields(MaraConfig)]
    names = [*_own_names(), "preset", *config]
    inside = {
        field.name: section
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    }
    for name in options:
        if name in names:
            continue
        # The name alone may be right, and its section be missing.
        close = (
            [f"{inside[name]}.{name}"]
            if name in inside
            else difflib.get_close_matches(str(name), names, n=1)
        )
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown option {name!r}{hint} Allowed: {', '.join(names)}")


def _underscored(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Names as the fields have them: a-b is a_b, in sections too."""
    named = {str(name).replace("-", "_"): value for name, value in options.items()}
    return {
        name: _underscored(value) if name in SECTIONS and isinstance(value, Mapping) else value
        for name, value in named.items()
    }
