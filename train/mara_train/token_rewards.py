"""Rewards of transitions: the KL penalty of each, and the final reward of the episode (Eq. 8).

    r_t = -λ penalty(log π(t_k), log π_ref(t_k))                      of its own candidate, or of
                                                                      its position's accepted one
        + γ^(positions behind t's own) R                              postback, or at the last only

    policy "cascade"   log π = Eq. 6 (conditional), or logσ(d): the accept probability alone
    policy "softmax"   the authors': log_softmax over the set of those *probabilities*
    reference          log-probability of the candidate / temperature, over the set or vocabulary,
                       or (``per_sequence``) the mean log-probability of the sequence with it
    penalty            kl: x = log π - log π_ref;  abs: |x|;  mse: x² / 2;  full: π x

Shapes: B slots, W window, T transitions of an episode.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_fast.options import check, check_choices, is_number, make_floats


@dataclass(frozen=True, kw_only=True)
class TokenRewardConfig:
    """Which rewards; the defaults are the authors'."""

    kl_weight: float = 0.1
    """λ of Eq. 8."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """How the difference of log-probabilities is penalised."""
    kl_of: Literal["candidate", "outcome"] = "candidate"
    """Whose penalty a transition gets: its own candidate's, accepted or not (authors), or that of
    the candidate which the position ends with, so that it is a matter of what was done."""
    policy: Literal["cascade", "softmax"] = "softmax"
    """What log π is: Eq. 6, or the authors' log-softmax over probabilities."""
    conditional: bool = True
    """Whether π is that of Eq. 6, or the accept probability of the candidate alone."""
    reference_temperature: float = 0.8
    """Divides the reference's log-probabilities."""
    reference_over_set: bool = False
    """Whether the reference is normalised over the candidate set instead of the vocabulary."""
    reference_per_sequence: bool = False
    """Whether the reference is the mean log-probability of the sequence so far and the candidate
    (the authors' ``sum_logit``)."""
    postback: Literal["all", "all_but_first", "last"] = "all_but_first"
    """Which transitions get the episode's final reward. Authors: all but the first."""
    postback_gamma: float = 0.99
    """Discount of the final reward per decided position in between."""

    def __post_init__(self) -> None:
        check_choices(self)
        check("kl_weight", self.kl_weight, is_number, "a number >= 0", minimum=0)
        check(
            "reference_temperature", self.reference_temperature, is_number, "a number > 0", above=0
        )
        gamma = self.postback_gamma
        check("postback_gamma", gamma, is_number, "a number in [0, 1]", minimum=0, maximum=1)
        make_floats(self)

    @property
    def needs_whole_set(self) -> bool:
        """Whether every candidate of a set has to be scored, the ones not tried too."""
        return self.policy == "softmax"


def log_policy(
    accept_logit_BW: Tensor,
    *,
    log_cascade_BW: Tensor,
    inside_BW: Tensor,
    is_last_BW: Tensor,
    config: TokenRewardConfig,
) -> Tensor:
    """log π of the candidates, float32 [B, W]; see the top of the file.

    Args:
        accept_logit_BW: float32 [B, W], d.
        log_cascade_BW: float32 [B, W], log π of Eq. 6.
        inside_BW: bool [B, W], columns that are candidates.
        is_last_BW: bool [B, W], the last candidate where it is accepted in any case: what Eq. 6
            leaves to it is all that is left.
    """
    if config.policy == "softmax":
        log_prob_BW = log_cascade_BW if config.conditional else F.logsigmoid(accept_logit_BW)
        prob_BW = log_prob_BW.exp().masked_fill(~inside_BW, -torch.inf)
        return torch.log_softmax(prob_BW, dim=-1)
    if not config.conditional:
        return F.logsigmoid(accept_logit_BW)
    certain_BW = log_cascade_BW - F.logsigmoid(accept_logit_BW)
    return torch.where(is_last_BW, certain_BW, log_cascade_BW)


def log_reference(
    logprob_BW: Tensor,
    *,
    log_norm_B: Tensor,
    emitted_logprob_B: Tensor,
    num_emitted_B: Tensor,
    config: TokenRewardConfig,
) -> Tensor:
    """log π_ref of the candidates, float32 [B, W].

    Args:
        logprob_BW: float32 [B, W], over the vocabulary.
        log_norm_B: float32 [B], log of the mass of the candidate set at the reference temperature.
        emitted_logprob_B: float32 [B], sum of the log-probabilities of the tokens emitted.
        num_emitted_B: int64 [B]
    """
    temperature = config.reference_temperature
    if config.reference_per_sequence:
        total_BW = emitted_logprob_B[:, None] + logprob_BW
        return total_BW / temperature / (num_emitted_B + 1)[:, None]
    scaled_BW = logprob_BW / temperature
    return scaled_BW - log_norm_B[:, None] if config.reference_over_set else scaled_BW


def penalty(log_policy: Tensor, log_reference: Tensor, config: TokenRewardConfig) -> Tensor:
    """What λ multiplies."""
    x = log_policy - log_reference
    match config.kl_penalty:
        case "kl":
            return x
        case "abs":
            return x.abs()
        case "mse":
            return x.square() / 2
        case "full":
            return log_policy.exp() * x


def of_outcomes(rewards_T: Tensor, actions_T: Tensor, positions_T: Tensor) -> Tensor:
    """To each transition the reward of its position's accepted one; 0 where there is none.

    Args:
        rewards_T: float32 [T]
        actions_T: bool [T], True = accept.
        positions_T: int64 [T], ascending.
    """
    if not len(positions_T):
        return rewards_T
    _, number_T = torch.unique_consecutive(positions_T, return_inverse=True)
    outcome = rewards_T.new_zeros(int(number_T[-1]) + 1)
    outcome[number_T[actions_T]] = rewards_T[actions_T]
    return outcome[number_T]


def with_final_reward(
    token_rewards_T: Tensor, positions_T: Tensor, reward: float, config: TokenRewardConfig
) -> Tensor:
    """The transitions' rewards once the episode's final reward is known, float32 [T].

    Args:
        token_rewards_T: float32 [T], -λ penalty.
        positions_T: int64 [T], output position of each, ascending.
        reward: R, of the finished text.
    """
    if not len(positions_T):
        return token_rewards_T
    if config.postback == "last":
        share_T = torch.zeros_like(token_rewards_T)
        share_T[-1] = 1.0
    else:
        # Decided positions behind each transition's own; forced ones do not count.
        _, number_T = torch.unique_consecutive(positions_T, return_inverse=True)
        share_T = config.postback_gamma ** (number_T[-1] - number_T).to(token_rewards_T.dtype)
        if config.postback == "all_but_first" and len(share_T) > 1:
            share_T[0] = 0.0
    return token_rewards_T + reward * share_T
