"""Definition of truncation in torch: the rule of MARA section 3.1 to the letter.

    logprob = log_softmax(logits / temperature)            over the full vocabulary, float32
    top-k:  keep every token >= the k-th largest           ties are inclusive
    top-p:  q = softmax over the kept; keep a token iff    q(it) + q(all after it) > 1 - top_p
            at least one token stays
    order:  probability descending, ties by lower id

Shapes: B rows, V vocabulary, C columns (capacity).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CandidateSet(NamedTuple):
    """An ordered candidate set per row; columns at and beyond ``size`` hold id 0 and -inf."""

    ids: Tensor
    """int64 [B, C], probability descending."""
    logprobs: Tensor
    """float32 [B, C], natural log of the full-vocabulary softmax."""
    size: Tensor
    """int64 [B]. 0: the row has no distribution (NaN, +inf or nothing finite). More than C: that
    many tokens tie into the top-k, the columns are not valid, call again with that capacity."""


def truncate(
    logits: Tensor, *, top_k: int, top_p: float, temperature: float = 1.0, capacity: int = 64
) -> CandidateSet:
    """The candidate set of each row of logits.

    Equals transformers' ``TopKLogitsWarper`` followed by ``TopPLogitsWarper`` on the log-softmax,
    with equal probabilities ordered by id.

    Args:
        logits: [B, V], any floating dtype; computed in float32.
        top_k: tokens kept before top-p; 0 or anything above V means all.
        top_p: probability mass kept of the renormalised top-k, in [0, 1].
        temperature: divides the logits, > 0.
        capacity: columns C of the result, at least ``min(top_k, V)``; capped at V.

    Returns:
        The set, see :class:`CandidateSet`. No host synchronisation.

    Raises:
        ValueError: if capacity is smaller than the top-k asked for.
    """
    vocab_size = logits.shape[-1]
    k = min(top_k, vocab_size) if top_k > 0 else vocab_size
    capacity = min(capacity, vocab_size)
    if capacity < k:
        raise ValueError(f"capacity={capacity} is too small for top_k={k}: give capacity >= top_k")

    logprob_BV = torch.log_softmax(logits.float() / temperature, dim=-1)
    top_BC, id_BC = logprob_BV.topk(capacity, dim=-1)
    kth_B1 = top_BC[:, k - 1 : k]
    num_top_k_B = (logprob_BV >= kth_B1).sum(-1)

    # topk leaves ties in no order: sort by id, then stably by value.
    id_BC, by_id = id_BC.sort(dim=-1)
    top_BC, by_value = top_BC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    id_BC = id_BC.gather(-1, by_value)

    kept_BC = top_BC >= kth_B1
    # Summed from the tail, as the warper does, so that the cut falls on the same token.
    prob_BC = torch.softmax(top_BC.masked_fill(~kept_BC, -torch.inf), dim=-1)
    tail_mass_BC = prob_BC.flip(-1).cumsum(-1).flip(-1)
    size_B = (tail_mass_BC > 1 - top_p).sum(-1).clamp(min=1)

    valid_B = top_BC[:, 0].isfinite()
    size_B = torch.where(num_top_k_B > capacity, num_top_k_B, size_B) * valid_B
    column = torch.arange(capacity, device=logits.device)
    outside_BC = column >= size_B[:, None]
    return CandidateSet(
        ids=id_BC.masked_fill(outside_BC, 0),
        logprobs=top_BC.masked_fill(outside_BC, -torch.inf),
        size=size_B,
    )
