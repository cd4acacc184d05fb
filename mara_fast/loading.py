"""Models, tokenizers and agents from what a user names."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from mara_fast.agent import MaraAgent
from mara_fast.mixture import AgentMixture
from mara_fast.tensor_parallel import is_sharded, load_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mara_fast.language_model import FrozenLM

ModelLike: TypeAlias = "PreTrainedModel | str | os.PathLike[str]"
OneAgent: TypeAlias = "MaraAgent | str | os.PathLike[str]"
AgentLike: TypeAlias = "OneAgent | Sequence[OneAgent] | bool | None"

TINY = "tiny"
"""Name of the embedded default model."""


def load_model(
    model: ModelLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    tensor_parallel: bool = False,
) -> "PreTrainedModel":
    """A causal LM in eval mode.

    Args:
        model: hub id, path, ``"tiny"``, or a loaded model, which is used as it is.
        dtype: ``"auto"``: float32 on a CPU, else the checkpoint's; or a name or torch dtype.
        device: ``"auto"``: cuda if there is one.
        tensor_parallel: this process' part of it, see :mod:`mara_fast.tensor_parallel`.

    Raises:
        ValueError: unknown dtype or device, a model that is not a causal LM, or that cannot be
            loaded in parts.
        OSError: nothing at this path or hub id.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if tensor_parallel and not is_sharded(model.parameters()):
            raise ValueError("tensor_parallel=True, but the model is loaded already, and whole")
        for name, value in (("dtype", dtype), ("device", device)):
            if not isinstance(value, str) or value != "auto":
                warnings.warn(
                    f"{name}={value!r} has no effect: the model is loaded already; use model.to()",
                    stacklevel=3,
                )
        return model
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"model must be a hub id, a path, a PreTrainedModel or {TINY!r}, "
            f"got {type(model).__name__}"
        )
    if looks_like_path(model) and not os.path.isdir(model):
        raise FileNotFoundError(f"model {os.fspath(model)!r}: there is no such folder")
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    if tensor_parallel:
        if model == TINY:
            from mara_fast import tiny

            model = tiny.LM_PATH
        with named("model", model):
            return load_sharded(model, dtype=kind)
    if model == TINY:
        from mara_fast import tiny

        lm, _ = tiny.load(dtype=torch.float32 if kind == "auto" else kind)
        return lm.to(place)
    with named("model", model):
        return AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(place).eval()


def looks_like_path(source: "str | os.PathLike[str]") -> bool:
    """It cannot be a hub id."""
    text = os.fspath(source)
    return text.startswith((".", "~", os.sep)) or text.count("/") > 1


@contextmanager
def named(kind: str, source: "str | os.PathLike[str]") -> Iterator[None]:
    """Errors of transformers about a folder or hub id say which it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{kind} {os.fspath(source)!r}: {error}") from error


def load_tokenizer(model: ModelLike) -> "PreTrainedTokenizerBase | None":
    """The tokenizer at a model's path; None if there is none: prompts are then token ids."""
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model = model.config._name_or_path
    if model == TINY:
        from mara_fast import tiny

        model = tiny.LM_PATH
    if not model:
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def load_agent(agent: AgentLike, *, model: Any, lm: "FrozenLM") -> MaraAgent | AgentMixture | None:
    """The agent on the language model's device, checked against it; None for plain decoding.

    Args:
        agent: a :class:`MaraAgent`, a folder, a hub id, or a list of these, which decide together.
            None: the agent that the model brings along, if any. False: none.
        model: as the user names it.
        lm: the language model.

    Raises:
        ValueError: wrong type, wrong hidden size, NaN or infinite weights, an empty list.
    """
    if agent is None and isinstance(model, str) and model == TINY:
        from mara_fast import tiny

        agent = str(tiny.AGENT_PATH)
    if agent is None or agent is False:
        return None
    if not isinstance(agent, MaraAgent | str | os.PathLike | list | tuple):
        raise ValueError(
            "agent must be a MaraAgent, a folder, a hub id, a list of these, None or False, "
            f"got {type(agent).__name__}"
        )
    if not isinstance(agent, list | tuple):
        return _load_one(agent, lm, name="the agent")
    if not agent:
        raise ValueError(f"agent={agent!r} names no agent; plain decoding is agent=False")
    agents = [_load_one(one, lm, name=f"agent[{index}]") for index, one in enumerate(agent)]
    return agents[0] if len(agents) == 1 else AgentMixture.of(agents)


def _load_one(agent: Any, lm: "FrozenLM", *, name: str) -> MaraAgent:
    if isinstance(agent, str | os.PathLike):
        agent = MaraAgent.from_pretrained(agent)
    if not isinstance(agent, MaraAgent):
        raise ValueError(
            f"{name} must be a MaraAgent, a folder or a hub id, got {type(agent).__name__}"
        )
    if agent.config.hidden_size != lm.hidden_size:
        raise ValueError(
            f"{name} judges states of size {agent.config.hidden_size}, but {lm.name} has hidden "
            f"size {lm.hidden_size}: it was trained for another model"
            + (f" ({agent.config.base_model})" if agent.config.base_model else "")
        )
    for part, parameter in agent.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name}'s {part} holds NaN or infinite values")
    return agent.to(lm.device)


def choose_device(device: str | torch.device) -> torch.device:
    """The device named; ``"auto"``: cuda if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device={device!r} is not known; allowed: "auto", "cpu", "cuda", "cuda:1", ...'
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA device")
    return place


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> Any:
    """What transformers takes as dtype; ``"auto"``: float32 on a CPU, else the checkpoint's."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(
            f'dtype={dtype!r} is not known; allowed: "auto", "float32", "bfloat16", "float16"'
        )
    return kind
