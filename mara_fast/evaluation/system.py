"""One way to answer, and what a system reads that corrects another's answers (Aligner)."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mara_fast.agent import MaraAgent
from mara_fast.config import DecodingConfig
from mara_fast.options import check, is_int, known_options, plain, text_of_path

ALIGNER_TEMPLATE = (
    "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more "
    "helpful and harmless: {question} | {answer} ASSISTANT:"
)
"""How the Aligner reads what it corrects (Ji et al. 2024)."""

PRESETS = ("paper", "official")
MAX_SAMPLES = 10_000
"""Of ``best_of``."""
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
            object.__setattr__(self, name, text_of_path(getattr(self, name)))
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
