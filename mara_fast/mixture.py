"""Several agents that decide as one: their accept logits combined, by weights given per call.

    logit      d = Σ w_i d_i / Σ w_i
    product    p = Π σ(d_i)^w_i,  d = log p - log(1 - p)
    min        d = min d_i over the agents with w_i > 0

An agent of weight 0 is not asked. NaN of one that is asked stays NaN.

Shapes: N states, H hidden.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_fast.config import AgentCombination, DecodingConfig

if TYPE_CHECKING:
    from mara_fast.agent import MaraAgent

_CERTAIN = 15.0
"""Accept logit above which log(-log σ(d)) is -d, to the last digit of float32."""
_NEARLY_CERTAIN = 1e-3
"""-log p below which log(1 - p) is taken from the logarithm of -log p, and not from p."""


@dataclass(frozen=True)
class AgentMixture:
    """Agents, and how they are combined; stands where one :class:`MaraAgent` does.

    Equal if the agents are the same objects, with the same weights and combination.
    """

    agents: "tuple[MaraAgent, ...]"
    weights: tuple[float, ...]
    """One per agent, finite and >= 0, not all 0."""
    combination: AgentCombination = "logit"

    @classmethod
    def of(cls, agents: "Sequence[MaraAgent]") -> Self:
        """The agents with equal weights; warns where what their cards say differs."""
        _warn_of_contradictions(agents)
        return cls(tuple(agents), (1.0,) * len(agents))

    @property
    def decoding(self) -> DecodingConfig:
        """The decoding options of the first agent that has any, over the general defaults."""
        return next((a.decoding for a in self.agents if a.config.decoding), DecodingConfig())

    def with_dials(self, config: DecodingConfig) -> "AgentMixture":
        """These agents, weighted and combined as a config says."""
        weights = config.agent_weights or (1.0,) * len(self.agents)
        return dataclasses.replace(self, weights=weights, combination=config.agent_combination)

    def refresh_scoring(self) -> None:
        """Has the scoring kernel look at the parameters of all agents anew."""
        for agent in self.agents:
            agent.refresh_scoring()

    def accept_logit(self, states: Tensor) -> Tensor:
        """The combined accept logits.

        Args:
            states: [..., H], the language model's last hidden state after its final norm.

        Returns:
            float32 [...]. The mean of infinite logits of both signs is NaN.
        """
        asked = [(a, w) for a, w in zip(self.agents, self.weights, strict=True) if w > 0]
        logits = [agent.accept_logit(states).float() for agent, _ in asked]
        return combined(logits, [weight for _, weight in asked], self.combination)


def combined(
    logits: Sequence[Tensor], weights: Sequence[float], combination: AgentCombination
) -> Tensor:
    """One accept logit of several, elementwise.

    Args:
        logits: float32, of one shape; at least one.
        weights: finite, above 0.
        combination: see the module.
    """
    if combination == "product":
        return _product(logits, weights)
    if combination == "min":
        return torch.stack(list(logits)).amin(0)
    # Fractions of the largest first: a sum of weights may leave the range of a float.
    largest = max(weights)
    fractions = [weight / largest for weight in weights]
    total = sum(fractions)
    parts = [d * (f / total) for d, f in zip(logits, fractions, strict=True)]
    return torch.stack(parts).sum(0)


def dialed(
    agent: "MaraAgent | AgentMixture | None", config: DecodingConfig
) -> "MaraAgent | AgentMixture | None":
    """The agent as a config weights it; one alone is as it is."""
    return agent.with_dials(config) if isinstance(agent, AgentMixture) else agent


def check_dials(agent: "MaraAgent | AgentMixture | None", config: DecodingConfig) -> None:
    """Raises a ValueError if the config has weights of another number of agents."""
    if agent is not None:
        check_weights(
            config.agent_weights, len(agent.agents) if isinstance(agent, AgentMixture) else 1
        )
    elif config.agent_weights is not None:
        warnings.warn(
            f"agent_weights={config.agent_weights!r} has no effect: there is no agent",
            stacklevel=4,
        )


def check_weights(weights: Sequence[float] | None, num_agents: int) -> None:
    """Raises a ValueError unless there is a weight per agent, or None for all of them."""
    if weights is not None and len(weights) != num_agents:
        plural_s = ["s" * (number != 1) for number in (len(weights), num_agents)]
        raise ValueError(
            f"agent_weights={tuple(weights)!r} has {len(weights)} weight{plural_s[0]} for "
            f"{num_agents} agent{plural_s[1]}: give one per agent, in their order"
        )


def _product(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Logit of Π σ(d)^w, from s = -log p = Σ w·softplus(-d): d = -log(exp(s) - 1)."""
    if len(logits) == 1 and weights[0] == 1:
        return logits[0]
    surprisals = [-F.logsigmoid(d) for d in logits]
    s = torch.stack([w * each for w, each in zip(weights, surprisals, strict=True)]).sum(0)
    # Far below the smallest float s has a logarithm still.
    log_surprisals = [
        math.log(w) + torch.where(d > _CERTAIN, -d, each.log())
        for d, w, each in zip(logits, weights, surprisals, strict=True)
    ]
    log_s = torch.stack(log_surprisals).logsumexp(0)
    return torch.where(s < _NEARLY_CERTAIN, -log_s - s / 2, -(s + torch.log(-torch.expm1(-s))))


def _warn_of_contradictions(agents: "Sequence[MaraAgent]") -> None:
    """Says which decoding options and base models differ among the agents that have any."""
    trained = [agent for agent in agents if agent.config.decoding]
    options = [agent.decoding.to_dict() for agent in trained]
    differing = [
        f"{name} ({', '.join(repr(each[name]) for each in options)})"
        for name in (options[0] if options else ())
        if any(each[name] != options[0][name] for each in options)
    ]
    if differing:
        warnings.warn(
            f"the agents were trained with different decoding options: {'; '.join(differing)}. "
            "Those of the first are the defaults; options given in a call are used for all",
            stacklevel=4,
        )
    models = dict.fromkeys(a.config.base_model for a in agents if a.config.base_model)
    if len(models) > 1:
        warnings.warn(
            f"the agents were trained for different models: {', '.join(map(str, models))}. An "
            "agent judges the states of its own; elsewhere check its answers",
            stacklevel=4,
        )
