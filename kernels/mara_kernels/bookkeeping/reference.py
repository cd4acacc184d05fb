"""Definition of the bookkeeping in torch: what happens to a slot around the language model.

    propose   the pending candidates to the rows of a step
    settle    a decision to the best candidate, and where the position is decided to a token
    admit     a new candidate set; the token itself, where it is the only one

Shapes: B slots, W window, C columns of the candidate buffer, D columns of a new set, N tokens of
the output buffer, R rows of the step, H hidden, E tokens that end a sequence, L layers' keys and
values, S rows of a slot, K heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mara_kernels.bookkeeping.slots import (
    ACCEPTED,
    BAD_ACCEPT,
    BAD_LOGITS,
    EOS,
    FALLBACK,
    LENGTH,
    RUNNING,
    Slots,
)
from mara_kernels.cascade import Decision, Order, rank_of_tried
from mara_kernels.truncate import CandidateSet


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The candidates that a step forwards."""

    size: Tensor
    """int64 [B], candidates of the set; 0 where none is forwarded."""
    count: Tensor
    """int64 [B], those of this window."""
    rank: Tensor
    """int64 [B, W], probability rank; columns behind the slot's candidates repeat its first."""
    ids: Tensor
    """int64 [B, W]"""
    positions: Tensor
    """int64 [B, W]"""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Candidates that were forwarded and scored."""

    accept_logit: Tensor
    """float32 [B, W]"""
    hidden: Tensor
    """[R, H]"""
    place: Tensor | None
    """int64 [B, W], row of ``hidden``; None: slot by slot, R = B W."""
    count: Tensor
    """int64 [B], candidates of each slot."""


def pending(slots: Slots) -> Tensor:
    """int64 [B], candidates of each set; 0 where it outgrew the buffer, and waits for room."""
    return torch.where(slots.size <= slots.candidate_ids.shape[1], slots.size, 0)


def propose(
    slots: Slots, *, window: int, count: Tensor | None, last_position: int, order: Order
) -> Proposal:
    """Arguments as those of the operation."""
    size = pending(slots)
    if count is None:
        count = (size - slots.offset).clamp(0, window)
    column = torch.arange(window, device=size.device)
    # Beyond its own rows a slot repeats its first.
    tried = slots.offset[:, None] + torch.where(column < count[:, None], column, 0)
    rank = rank_of_tried(tried, size[:, None], order)
    rank = rank.clamp(min=0, max=slots.candidate_ids.shape[1] - 1)
    # An idle slot may be full; no row that counts points past the end.
    positions = slots.length[:, None].clamp(max=last_position).expand_as(rank)
    ids = slots.candidate_ids.gather(1, rank)
    return Proposal(size=size, count=count, rank=rank, ids=ids, positions=positions)


def hold(slots: Slots, scored: Scored, decision: Decision) -> None:
    """The first half of :func:`settle`: the best candidate so far, its position undecided."""
    better, row = decision.row >= 0, decision.row.clamp(min=0)
    slot = torch.arange(row.shape[0], device=row.device)
    width = scored.accept_logit.shape[1]
    place = slot * width + row if scored.place is None else scored.place[slot, row]
    slots.held_accepted.copy_(decision.held.accepted)
    slots.held_preference.copy_(decision.held.preference)
    slots.log_residual.copy_(decision.held.log_residual)
    slots.held_tried.copy_(torch.where(better, slots.offset + row, slots.held_tried))
    slots.held_logit.copy_(torch.where(better, scored.accept_logit[slot, row], slots.held_logit))
    slots.held_logprob.copy_(torch.where(better, decision.log_prob[slot, row], slots.held_logprob))
    slots.hidden.copy_(torch.where(better[:, None], scored.hidden[place], slots.hidden))


def settle(
    slots: Slots,
    scored: Scored,
    decision: Decision,
    *,
    order: Order,
    fallback_is_last: bool,
    eos_ids: Tensor,
) -> Tensor:
    """Arguments as those of the operation."""
    slots.num_forwards += scored.count > 0
    hold(slots, scored, decision)
    decided = decision.decided & ~decision.invalid
    slots.done.masked_fill_(decision.invalid, BAD_ACCEPT)
    slots.size.masked_fill_(decision.invalid, 0)
    # A set of one was emitted when it was admitted.
    asked = decided & (slots.size > 1)
    verdict = torch.where(slots.held_accepted, ACCEPTED, FALLBACK)
    _emit(
        slots,
        asked,
        verdict,
        order=order,
        eos_ids=eos_ids,
        policy_logprob=_policy_logprob(slots, fallback_is_last),
    )
    slots.length += decided
    slots.offset += scored.count
    slots.offset.masked_fill_(decided, 0)
    return decided & (slots.done == RUNNING)


def admit(
    slots: Slots,
    new: CandidateSet,
    chosen: Tensor,
    *,
    index: Tensor | None = None,
    verdict: int,
    order: Order,
    eos_ids: Tensor,
) -> None:
    """Arguments as those of the operation."""
    at: Tensor | slice = slice(None) if index is None else index
    mine, width = chosen[at], slots.candidate_ids.shape[1]
    size = torch.where(new.size > new.ids.shape[1], width + 1, new.size)
    slots.size[at] = torch.where(mine, size, slots.size[at])
    mine, spare = mine[:, None], (0, width - new.ids.shape[1])
    ids, logprobs = pad(new.ids, spare), pad(new.logprobs, spare, value=-torch.inf)
    slots.candidate_ids[at] = torch.where(mine, ids, slots.candidate_ids[at])
    slots.candidate_logprobs[at] = torch.where(mine, logprobs, slots.candidate_logprobs[at])
    slots.done.masked_fill_(chosen & (slots.size == 0), BAD_LOGITS)
    slots.held_tried.masked_fill_(chosen, 0)
    slots.held_logit.masked_fill_(chosen, torch.nan)
    _emit(slots, chosen & (slots.size == 1), verdict, order=order, eos_ids=eos_ids)


def keep_rows(rows: Tensor, row: Tensor, *, base: int, destination: Tensor, trash: int) -> None:
    """Arguments as those of the operation."""
    slot = torch.arange(row.shape[0], device=row.device)
    source = base + row.clamp(min=0)
    destination = torch.where(row >= 0, destination, trash)
    rows[:, slot, :, destination] = rows[:, slot, :, source]


def _policy_logprob(slots: Slots, fallback_is_last: bool) -> Tensor:
    """[B], that the sampled cascade emits the held candidate of a position decided now.

    Eq. 6, and for the token that is the fallback also that all are rejected. An accepted token
    may be it as well, but unless it was tried last nobody knows yet what becomes of the rest.
    """
    is_fallback = ~slots.held_accepted
    if fallback_is_last:
        is_fallback = is_fallback | (slots.held_tried == slots.size - 1)
    emitted = torch.logaddexp(slots.held_logprob, slots.log_residual)
    return torch.where(is_fallback, emitted, slots.held_logprob)


def _emit(
    slots: Slots,
    chosen: Tensor,
    verdict: Tensor | int,
    *,
    order: Order,
    eos_ids: Tensor,
    policy_logprob: Tensor | None = None,
) -> None:
    """Appends the held candidate of the pending position where chosen."""
    most = slots.record.shape[1]
    column = slots.num_tokens.clamp(max=most - 1)
    slot = torch.arange(column.shape[0], device=column.device)
    rank = rank_of_tried(slots.held_tried, slots.size, order)
    rank = rank.clamp(min=0, max=slots.candidate_ids.shape[1] - 1)
    token = slots.candidate_ids[slot, rank]
    if isinstance(verdict, int):
        verdict = torch.full_like(token, verdict)
    values = torch.stack((token, slots.size, rank, slots.held_tried, verdict), dim=-1)
    logprob = slots.candidate_logprobs[slot, rank]
    if policy_logprob is None:
        policy_logprob = reference = torch.full_like(logprob, torch.nan)
    else:
        # Columns behind the set hold -inf.
        reference = logprob - slots.candidate_logprobs.logsumexp(-1)
    floats = torch.stack((logprob, slots.held_logit, policy_logprob, reference), dim=-1)
    chosen_B1 = chosen[:, None]
    slots.record[slot, column] = torch.where(chosen_B1, values, slots.record[slot, column])
    slots.record_floats[slot, column] = torch.where(
        chosen_B1, floats, slots.record_floats[slot, column]
    )
    slots.num_tokens += chosen
    if eos_ids.numel():
        slots.done.masked_fill_(chosen & (token[:, None] == eos_ids).any(-1), EOS)
    full = chosen & (slots.num_tokens >= most) & (slots.done == RUNNING)
    slots.done.masked_fill_(full, LENGTH)
    slots.size.masked_fill_(chosen & (slots.done != RUNNING), 0)
