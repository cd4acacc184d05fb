"""What the flags say that commands share: a model, agents, options of decoding."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mara_fast.options import from_yaml

if TYPE_CHECKING:
    from mara_fast.config import DecodingConfig
    from mara_fast.data_parallel import ParallelEngine
    from mara_fast.engine import Engine


class Preset(StrEnum):
    """Named decoding options."""

    paper = "paper"
    official = "official"


DECODING = "Decoding (default: the agent's own options, else the paper's)"
MODEL = "Model"
_OPTION_OF_FLAG = {"stop": "stop_strings", "agent_weight": "agent_weights"}
"""Of the flags that are given once per value."""


def chosen_agent(
    agents: list[str] | None, *, no_agent: bool
) -> str | tuple[str, ...] | Literal[False] | None:
    """What ``--agent`` and ``--no-agent`` say, as :class:`EngineOptions` takes it."""
    if no_agent and agents:
        raise ValueError("give --agent or --no-agent, not both")
    if no_agent:
        return False
    if not agents:
        return None
    return agents[0] if len(agents) == 1 else tuple(agents)


def check_dial_flags(
    given: Mapping[str, Any], agent: str | tuple[str, ...] | Literal[False] | None
) -> None:
    """Raises a ValueError for weights of another number of agents, before a model is loaded.

    Args:
        given: options, as :func:`given_options` makes them.
        agent: what :func:`chosen_agent` says; how many None are only the model knows.
    """
    from mara_fast.mixture import check_weights
    from mara_fast.options import several

    weights = given.get("agent_weights")
    if weights is not None and agent is not None:
        num_agents = 0 if agent is False else len(several(agent, str))
        check_weights(several(weights, float), num_agents)


def given_options(
    config_path: Path | None, preset: Preset | None, flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of the file, then those of the flags, checked before a model is loaded."""
    options = {name: value for name, value in flags.items() if value is not None}
    if "window" in options and options["window"].isdecimal():
        options["window"] = int(options["window"])
    for flag, option in _OPTION_OF_FLAG.items():
        values = options.pop(flag, None)
        if values:
            options[option] = values
    given = _yaml(config_path) | options
    _check_options(preset, given)
    return given


def with_decoding_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command that also has the flags of ``generate`` for a model and for decoding.

    Args:
        command: takes the values of these flags, by name, as ``flags``.
    """
    from mara_fast.cli import generate

    own = dict(inspect.signature(command).parameters)
    del own["flags"]
    shared = {
        name: parameter
        for name, parameter in inspect.signature(generate).parameters.items()
        if name not in (*own, "num_gpus", "tensor_parallel")
        and any(
            getattr(note, "rich_help_panel", None) in (MODEL, DECODING)
            for note in getattr(parameter.annotation, "__metadata__", ())
        )
    }

    @functools.wraps(command)
    def flagged(**values: Any) -> None:
        flags = {name: values.pop(name) for name in shared}
        command(**values, flags=flags)

    parameters = [*own.values(), *shared.values()]
    flagged.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flagged.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flagged


def stdin_prompt() -> str:
    """The prompt on standard input.

    Raises:
        ValueError: there is none.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, by standard input, or --input FILE")
    text = sys.stdin.read().strip("\r\n")
    if not text:
        raise ValueError("standard input is empty: no prompt")
    return text


def config_in_force(
    engine: "Engine | ParallelEngine", preset: Preset | None, given: dict[str, Any]
) -> "DecodingConfig":
    """Those given, over the preset's, else over the agent's own."""
    from mara_fast.config import DecodingConfig

    base = getattr(DecodingConfig, preset.value)() if preset else None
    return engine.config(base, **given)


def _yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold option: value lines")
    # As the flags are written.
    names = {name: str(name).replace("-", "_") for name in values}
    return {_OPTION_OF_FLAG.get(names[k], names[k]): v for k, v in values.items()}


def _check_options(preset: Preset | None, given: dict[str, Any]) -> None:
    """Finds a bad option before a model is loaded."""
    from mara_fast.config import DecodingConfig

    if preset is not None:
        getattr(DecodingConfig, preset.value)(**given)
        return
    # The agent may allow more tokens than we do by default.
    DecodingConfig.from_dict({"max_new_tokens": sys.maxsize} | given)
