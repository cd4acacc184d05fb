"""Definition of the cascade in torch: accept logits of a window to a decision.

    for candidate in the order tried:                 MARA section 3.2, Eq. 5
        accepted?  greedy: d > logit(threshold)       sampled: u(seed, sequence, position, rank) < p
        first accepted -> chosen                      (strategy "first")
    none accepted -> fallback

Every strategy and fallback is one lexicographic maximum of (accepted, preference) over the
candidates, so a position can be scored in windows of any width: what has to survive between two
windows is the best candidate so far (:class:`Held`).

Shapes: B slots, W window.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_kernels.cascade.philox import acceptance_uniforms

Acceptance = Literal["greedy", "sample"]
Strategy = Literal["first", "max_prob", "random"]
Fallback = Literal["last", "first", "max_prob"]
Order = Literal["descending", "reverse", "top_last"]

ACCEPTANCES: tuple[str, ...] = get_args(Acceptance)
STRATEGIES: tuple[str, ...] = get_args(Strategy)
FALLBACKS: tuple[str, ...] = get_args(Fallback)
ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True, kw_only=True)
class CascadeRule:
    """What decides among the candidates of a position."""

    acceptance: Acceptance = "greedy"
    """``greedy``: accept iff the accept probability exceeds the threshold. ``sample``: draw."""
    threshold: float = 0.5
    """In (0, 1). Moves the accept logit by -logit(threshold), in both acceptances."""
    strategy: Strategy = "first"
    """Among the accepted: the first tried, the one of largest accept probability, or any."""
    fallback: Fallback = "last"
    """When all are rejected: the last tried, the first tried, or of largest accept probability."""
    order: Order = "descending"
    """Order tried: by falling probability, by rising, or rank 1, 2, ... and rank 0 at the end."""
    seed: int = 0
    """Key of the counter-based generator."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("acceptance", ACCEPTANCES),
            ("strategy", STRATEGIES),
            ("fallback", FALLBACKS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(allowed)}"
                )
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold!r} is not allowed; allowed: in (0, 1)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed!r} is not allowed; allowed: in [0, 2**64)")

    @property
    def threshold_logit(self) -> float:
        """logit(threshold), 0.0 exactly at 0.5."""
        return math.log(self.threshold / (1 - self.threshold))


class Held(NamedTuple):
    """The best candidate of the windows so far, reset by the cascade where ``offset`` is 0."""

    accepted: Tensor
    """bool [B]"""
    preference: Tensor
    """float32 [B]"""
    log_residual: Tensor
    """float32 [B], log-probability that every candidate so far is rejected."""

    @classmethod
    def empty(cls, num_slots: int, device: torch.device | str) -> "Held":
        """Nothing held."""
        return cls(
            torch.zeros(num_slots, dtype=torch.bool, device=device),
            torch.full((num_slots,), -torch.inf, device=device),
            torch.zeros(num_slots, device=device),
        )


class Decision(NamedTuple):
    """What a window decided."""

    row: Tensor
    """int64 [B], window row that is now the best candidate; -1: the held one still is."""
    decided: Tensor
    """bool [B], the position is final: its token is the best candidate."""
    invalid: Tensor
    """bool [B], a NaN accept logit was met before the decision."""
    held: Held
    log_prob: Tensor
    """float32 [B, W], log of Eq. 6: that the cascade chooses this candidate; -inf outside."""


def rank_of_tried(tried: Tensor, size: Tensor, order: Order) -> Tensor:
    """Probability rank of the candidate tried at index ``tried``; elementwise, int64."""
    if order == "reverse":
        return size - 1 - tried
    if order == "top_last":
        return torch.where(tried == size - 1, 0, tried + 1)
    return tried


def cascade(
    accept_logit_BW: Tensor,
    *,
    offset: Tensor,
    size: Tensor,
    held: Held,
    rule: CascadeRule,
    sequence: Tensor,
    position: Tensor,
    count: Tensor,
) -> Decision:
    """Decides a window of candidates per slot; arguments as those of the operation."""
    d = accept_logit_BW
    num_slots, window = d.shape
    column = torch.arange(window, device=d.device)
    tried = offset[:, None] + column
    end = offset + count.clamp(0, window)
    inside = tried < torch.minimum(size, end)[:, None]
    rank = rank_of_tried(tried, size[:, None], rule.order)
    forced = size == 1

    draw = key = None
    if rule.acceptance == "sample" or rule.strategy == "random":
        draw, key = acceptance_uniforms(rule.seed, sequence[:, None], position[:, None], rank)
    if rule.acceptance == "greedy":
        accepted = d > rule.threshold_logit
    else:
        assert draw is not None
        accepted = draw < torch.sigmoid(d - rule.threshold_logit)
    accepted = (accepted | forced[:, None]) & inside

    # Reset where the position begins.
    first = offset == 0
    held_accepted = held.accepted & ~first
    held_preference = held.preference.masked_fill(first, -torch.inf)
    log_residual = held.log_residual.masked_fill(first, 0.0)

    when_accepted = {"first": -tried, "max_prob": d, "random": key}[rule.strategy]
    when_rejected = {"first": -tried, "last": tried, "max_prob": d}[rule.fallback]
    assert when_accepted is not None
    any_accepted = accepted.any(-1)
    eligible = torch.where(any_accepted[:, None], accepted, inside)
    preference = torch.where(any_accepted[:, None], when_accepted.float(), when_rejected.float())
    # NaN is preferred to nothing.
    preference = preference.masked_fill(~eligible | preference.isnan(), -torch.inf)
    best_preference, best_row = preference.max(-1)
    # max() promises no order among equals; the first tried wins.
    best_row = (preference == best_preference[:, None]).int().argmax(-1)
    better = (any_accepted & ~held_accepted) | (
        (any_accepted == held_accepted) & (best_preference > held_preference)
    )
    better &= inside.any(-1)

    ends = any_accepted if rule.strategy == "first" else torch.zeros_like(any_accepted)
    decided = inside.any(-1) & (ends | (end >= size))

    # Only a candidate that the sequential cascade would have asked can be invalid.
    asked = inside & ~forced[:, None]
    if rule.strategy == "first":
        first_accepted = torch.where(any_accepted, accepted.int().argmax(-1), window)
        asked = asked & (column < first_accepted[:, None])
    invalid = (d.isnan() & asked).any(-1)

    shifted = (d - rule.threshold_logit).masked_fill(~inside, -torch.inf)
    log_reject = F.logsigmoid(-shifted).masked_fill(~inside, 0.0)
    # [B, W+1]: that everything before the candidate is rejected; the last column carries on.
    log_rejected = torch.cat((log_residual[:, None], log_reject), dim=-1).cumsum(-1)
    log_prob = F.logsigmoid(shifted) + log_rejected[:, :-1]
    log_prob = log_prob.masked_fill(~inside, -torch.inf)
    return Decision(
        row=torch.where(better, best_row, -1),
        decided=decided,
        invalid=invalid,
        held=Held(
            torch.where(better, any_accepted, held_accepted),
            torch.where(better, best_preference, held_preference),
            log_rejected[:, -1],
        ),
        log_prob=log_prob,
    )
