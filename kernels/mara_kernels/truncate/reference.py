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
    """int64 [B]. 0: the row has no distribution (NaN, +inf or nothing finite). C + 1: more tokens
    may tie into the top-k than there are columns; call again with a larger capacity."""


def truncate(
    logits: Tensor, *, top_k: int, top_p: float, temperature: float, capacity: int
) -> CandidateSet:
    """The candidate set of each row of logits; arguments as those of the operation, with
    ``1 <= top_k <= capacity <= V``."""
    vocab_size = logits.shape[-1]
    # Dividing by 1 changes nothing, and passes over the vocabulary.
    scaled_BV = logits.float() if temperature == 1 else logits.float() / temperature
    logprob_BV = torch.log_softmax(scaled_BV, dim=-1)
    top_BC, id_BC = _largest(logprob_BV, capacity)
    kth_B1 = top_BC[:, top_k - 1 : top_k]
    # The last column ties with the k-th: further ties may have found no column. Ties at -inf have
    # no mass and are dropped by top-p in any case.
    last_B1 = top_BC[:, -1:]
    overflows_B = ((last_B1 >= kth_B1) & (last_B1 > -torch.inf))[:, 0]

    # topk leaves ties in no order: sort by id, then stably by value.
    id_BC, by_id = id_BC.sort(dim=-1)
    top_BC, by_value = top_BC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    id_BC = id_BC.gather(-1, by_value)

    # Summed from the tail, as the warper does, so that the cut falls on the same token.
    prob_BC = torch.softmax(top_BC.masked_fill(top_BC < kth_B1, -torch.inf), dim=-1)
    tail_mass_BC = prob_BC.flip(-1).cumsum(-1).flip(-1)
    size_B = (tail_mass_BC > 1 - top_p).sum(-1).clamp_(min=1)
    if capacity < vocab_size:
        size_B.masked_fill_(overflows_B, capacity + 1)
    size_B *= top_BC[:, 0].isfinite()
    column = torch.arange(capacity, device=logits.device)
    outside_BC = column >= size_B[:, None]
    return CandidateSet(
        ids=id_BC.masked_fill_(outside_BC, 0),
        logprobs=top_BC.masked_fill_(outside_BC, -torch.inf),
        size=size_B,
    )


_GROUP = 32
"""Tokens that compete for a place in the second round."""


def _largest(values: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The ``num`` largest values of each row and where they are, in two rounds.

    Everything above the num-th largest group maximum lies in the num groups with the largest
    maxima, so only those have to be searched. Among equals any may be returned.
    """
    num_rows, width = values.shape
    num_groups = width // _GROUP
    if num_groups <= 2 * num:
        return values.topk(num, dim=-1)
    grouped = values[:, : num_groups * _GROUP].view(num_rows, num_groups, _GROUP)
    _, group = grouped.amax(-1).topk(num, dim=-1)
    place = torch.arange(_GROUP, device=values.device)
    index = (group[..., None] * _GROUP + place).view(num_rows, -1)
    # The tail that fills no group goes on to the second round as it is.
    tail = torch.arange(num_groups * _GROUP, width, device=values.device)
    index = torch.cat((index, tail.expand(num_rows, -1)), dim=-1)
    largest, chosen = values.gather(-1, index).topk(num, dim=-1)
    return largest, index.gather(-1, chosen)


def greedy(logits: Tensor) -> CandidateSet:
    """Arguments as those of the operation."""
    ids = logits.argmax(dim=-1, keepdim=True)
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, ids)
    is_valid = logprobs.isfinite()
    return CandidateSet(
        ids.masked_fill(~is_valid, 0),
        logprobs.masked_fill(~is_valid, -torch.inf),
        is_valid[:, 0].long(),
    )
