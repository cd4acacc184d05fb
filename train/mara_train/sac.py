"""Discrete soft actor-critic for the accept model (MARA section 3.3, Eq. 9 to 11).

    y       = r + γ (1 - done) Σ_a π(a|s') (min_i Q'_i(s', a) - α log π(a|s'))
    critic:   Σ_i (Q_i(s, a) - y)² / 2
    actor:    Σ_a π(a|s) (α log π(a|s) - min_i Q_i(s, a))
    α:        α (H(π(s)) - H̄)                                 H̄ may be moved while it learns
    target:   Q' <- Q' + τ (Q - Q')

Both expectations are sums: there are two actions. With the accept logit d, log π(accept) is
logsigmoid(d) and log π(reject) logsigmoid(-d).

An update reads nothing on the host, so that it can be captured into a CUDA graph.

Shapes: B transitions of a batch, H hidden.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mara_fast.agent import MaraAgent
from mara_fast.options import check, check_choices, is_int, is_number, make_floats
from mara_train.critic import TwinCritic

_WARM_STEPS = 3
"""Before a capture."""

METRICS = ("critic_loss", "actor_loss", "alpha_loss", "alpha", "entropy", "q1", "q2", "q_gap")
"""What an update reports, in order: see :meth:`Sac.update`."""


@dataclass(frozen=True, kw_only=True)
class SacConfig:
    """Options of the learner; the defaults are the authors'."""

    actor_learning_rate: float = 3e-4
    """Of Adam."""
    critic_learning_rate: float = 3e-4
    """Of Adam."""
    alpha_learning_rate: float = 3e-4
    """Of Adam, on log α."""
    gamma: float = 0.99
    """γ, discount of the bootstrapped value; 0 leaves the next state out."""
    tau: float = 0.005
    """τ, how far the target critic moves towards the critic at an update of it."""
    target_interval: int = 10
    """Gradient steps between updates of the target critic."""
    initial_alpha: float = 0.01
    """α before the first step."""
    target_entropy: float = 0.6 * math.log(2)
    """H̄ in nats; at most ln 2 can be reached. Paper: 2."""
    max_grad_norm: float = 0.5
    """Norm to which the gradients of actor, critic and log α are clipped, each."""
    critic_loss: Literal["separate", "mean"] = "separate"
    """``separate``: each head's error is squared (authors); ``mean``: their mean's (Eq. 10)."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("actor_learning_rate", "critic_learning_rate", "alpha_learning_rate"):
            check(name, getattr(self, name), is_number, "a number >= 0", minimum=0)
        for name in ("gamma", "tau"):
            check(name, getattr(self, name), is_number, "a number in [0, 1]", minimum=0, maximum=1)
        for name in ("initial_alpha", "max_grad_norm"):
            check(name, getattr(self, name), is_number, "a number > 0", above=0)
        check("target_interval", self.target_interval, is_int, "an integer >= 1", minimum=1)
        check("target_entropy", self.target_entropy, is_number, "a number of nats")
        make_floats(self)


class Batch(NamedTuple):
    """Transitions."""

    states: Tensor
    """[B, H], any floating dtype."""
    actions: Tensor
    """int64 [B], 1 = accept."""
    rewards: Tensor
    """float32 [B]"""
    next_states: Tensor
    """[B, H]; not read where done, nor with γ = 0."""
    done: Tensor
    """bool [B], the last transition of its episode."""


class Sac:
    """The learner: an agent, a twin critic, its target and α, each with its optimizer.

    Args:
        agent: trained in place; its parameters will require gradients.
        config: options.
        device: where it learns; the agent is moved there.
    """

    def __init__(
        self, agent: MaraAgent, config: SacConfig, *, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.agent = agent.to(device).requires_grad_(True).train()
        self.critic = TwinCritic(agent.config.hidden_size, agent.config.inner_size).to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.tensor(
            math.log(config.initial_alpha), device=device, requires_grad=True
        )
        # A tensor, for a captured graph to find.
        self.target_entropy = torch.tensor(config.target_entropy, device=device)
        self.optimizers = {
            name: self._optimizer(parameters, rate)
            for name, parameters, rate in (
                ("actor", self.agent.parameters(), config.actor_learning_rate),
                ("critic", self.critic.parameters(), config.critic_learning_rate),
                ("alpha", [self.log_alpha], config.alpha_learning_rate),
            )
        }
        self.num_steps = 0
        self._num_warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: Batch | None = None

    def _optimizer(self, parameters: Iterable[Tensor], rate: float) -> torch.optim.Adam:
        if not self.log_alpha.is_cuda:
            return torch.optim.Adam(parameters, lr=rate, fused=True)
        # A captured graph finds step counts and learning rates on the device.
        tensor = torch.tensor(rate, device=self.log_alpha.device)
        return torch.optim.Adam(parameters, lr=tensor, capturable=True)

    def scale_learning_rates(self, factor: float) -> None:
        """Actor and critic go on with this share of their learning rates."""
        for name, rate in (
            ("actor", self.config.actor_learning_rate),
            ("critic", self.config.critic_learning_rate),
        ):
            for group in self.optimizers[name].param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    @property
    def device(self) -> torch.device:
        """Where it learns."""
        return self.log_alpha.device

    def update(self, batch: Batch) -> Tensor:
        """One gradient step of critic, actor and α, in this order; the target follows in its turn.

        Returns:
            float32 [8], the metrics of :data:`METRICS`: the three losses and α as they are
            after the step, the mean entropy of the policy in nats, the mean of each head's value
            of the actions taken, and the mean of Q(accept) - Q(reject).
        """
        metrics = self._replayed_step(batch) if self.device.type == "cuda" else None
        if metrics is None:
            metrics = self.gradient_step(batch)
        self.num_steps += 1
        if self.num_steps % self.config.target_interval == 0:
            self.move_target()
        return metrics

    def gradient_step(self, batch: Batch) -> Tensor:
        """:meth:`update` without the target's turn: the part that is the same every time."""
        # Optimizers write without a trace that the folded parameters would notice.
        self.agent.refresh_scoring()
        alpha = self.log_alpha.detach().exp()
        wanted_B = self._targets(batch, alpha)

        value_2B2 = self.critic(batch.states)
        taken_2B = value_2B2.gather(2, batch.actions.expand(2, -1)[..., None])[..., 0]
        if self.config.critic_loss == "separate":
            critic_loss = F.mse_loss(taken_2B, wanted_B.expand(2, -1))
        else:
            critic_loss = F.mse_loss(taken_2B.mean(0), wanted_B)
        self._descend("critic", list(self.critic.parameters()), critic_loss)

        with torch.no_grad():
            value_B2 = self.critic(batch.states).amin(0)
        logprob_B2 = _log_policy(self.agent.accept_logit(batch.states))
        prob_B2 = logprob_B2.exp()
        entropy_B = -(prob_B2 * logprob_B2).sum(1)
        actor_loss = -(alpha * entropy_B + (prob_B2 * value_B2).sum(1)).mean()
        self._descend("actor", list(self.agent.parameters()), actor_loss)

        surplus = (entropy_B.detach() - self.target_entropy).mean()
        alpha_loss = self.log_alpha.exp() * surplus
        self._descend("alpha", [self.log_alpha], alpha_loss)

        mean_2 = taken_2B.detach().mean(1)
        return torch.stack(
            (
                critic_loss.detach(),
                actor_loss.detach(),
                alpha_loss.detach(),
                self.log_alpha.detach().exp(),
                entropy_B.detach().mean(),
                mean_2[0],
                mean_2[1],
                (value_B2[:, 1] - value_B2[:, 0]).mean(),
            )
        )

    def _replayed_step(self, batch: Batch) -> Tensor | None:
        """A gradient step by replaying a captured graph; None: it has to be taken without.

        The first few steps are, to warm up what allocates and compiles; so is one whose batch has
        another size than theirs.
        """
        if self._graph is None:
            self._num_warm += 1
            if self._num_warm <= _WARM_STEPS:
                return None
            self._static = Batch(*(tensor.clone() for tensor in batch))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._metrics = self.gradient_step(self._static)
        assert self._static is not None
        if any(a.shape != b.shape for a, b in zip(self._static, batch, strict=True)):
            return None
        for static, tensor in zip(self._static, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._metrics.clone()

    @torch.no_grad()
    def move_target(self) -> None:
        """The target critic, a step of τ towards the critic."""
        torch._foreach_lerp_(
            list(self.target.parameters()), list(self.critic.parameters()), self.config.tau
        )

    @torch.no_grad()
    def _targets(self, batch: Batch, alpha: Tensor) -> Tensor:
        """y, float32 [B]."""
        if not self.config.gamma:
            return batch.rewards
        logprob_B2 = _log_policy(self.agent.accept_logit(batch.next_states))
        value_B2 = self.target(batch.next_states).amin(0)
        soft_B = (logprob_B2.exp() * (value_B2 - alpha * logprob_B2)).sum(1)
        # Behind the last transition lies another episode, or nothing yet: whatever it holds.
        soft_B = soft_B.masked_fill(batch.done, 0.0)
        return batch.rewards + self.config.gamma * soft_B

    def _descend(self, name: str, parameters: Sequence[Tensor], loss: Tensor) -> None:
        # None of them has a gradient yet: autograd hands over its own tensors.
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "agent": self.agent.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "target_entropy": self.target_entropy,
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, in place."""
        for name in ("agent", "critic", "target"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
            self.target_entropy.copy_(state["target_entropy"])
        for name, each in self.optimizers.items():
            each.load_state_dict(state["optimizers"][name])
        # It would write to the moments that were there before.
        self._graph, self._num_warm = None, 0
        self.num_steps = state["num_steps"]


def _log_policy(accept_logit_B: Tensor) -> Tensor:
    """log π of (reject, accept), [B, 2]."""
    return F.logsigmoid(torch.stack((-accept_logit_B, accept_logit_B), dim=1))
