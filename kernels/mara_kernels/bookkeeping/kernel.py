"""The bookkeeping in Triton: the definition of :mod:`reference`, one program per slot.

A launch each instead of dozens, which between the language model's products would take longer than
the work. One warp each: the first thread writes what all threads have read, and no warp may be
behind it.

Shapes: B slots, W window, C columns of the candidate buffer, D columns of a new set, N tokens of
the output buffer, R rows of the step, H hidden, E tokens that end a sequence, L layers' keys and
values, S rows of a slot, K heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.bookkeeping import slots as values
from mara_kernels.bookkeeping.reference import Proposal, Scored
from mara_kernels.bookkeeping.slots import Slots
from mara_kernels.cascade import Decision, Order
from mara_kernels.truncate import CandidateSet

_RUNNING = tl.constexpr(values.RUNNING)
_EOS = tl.constexpr(values.EOS)
_LENGTH = tl.constexpr(values.LENGTH)
_BAD_LOGITS = tl.constexpr(values.BAD_LOGITS)
_BAD_ACCEPT = tl.constexpr(values.BAD_ACCEPT)
_ACCEPTED = tl.constexpr(values.ACCEPTED)
_FALLBACK = tl.constexpr(values.FALLBACK)
_LOG2E = tl.constexpr(1.4426950408889634)

# A run's slots may begin anywhere in the batch.
_OF_SLOTS = [
    "length_ptr",
    "candidate_ptr",
    "candidate_logprob_ptr",
    "size_ptr",
    "offset_ptr",
    "held_accepted_ptr",
    "held_preference_ptr",
    "log_residual_ptr",
    "held_tried_ptr",
    "held_logit_ptr",
    "held_logprob_ptr",
    "num_tokens_ptr",
    "num_forwards_ptr",
    "done_ptr",
    "record_ptr",
    "record_floats_ptr",
    "chosen_ptr",
]

_BLOCK = 1024
"""Columns, or elements of keys, at a time."""


@triton.jit
def _rank_of(tried, size, ORDER: tl.constexpr):
    """Probability rank of the candidate tried at an index."""
    if ORDER == "reverse":
        return size - 1 - tried
    elif ORDER == "top_last":
        return tl.where(tried == size - 1, 0, tried + 1)
    else:
        return tried


@triton.jit(
    do_not_specialize=["columns", "window", "last_position"],
    do_not_specialize_on_alignment=_OF_SLOTS,
)
def proposing(
    length_ptr,  # int64 [B]
    size_ptr,  # int64 [B]
    offset_ptr,  # int64 [B]
    candidate_ptr,  # int64 [B, C]
    given_ptr,  # int64 [B], rows of each slot; GIVEN: else not read
    new_size_ptr,  # int64 [B]
    count_ptr,  # int64 [B]
    rank_ptr,  # int64 [B, W]
    id_ptr,  # int64 [B, W]
    position_ptr,  # int64 [B, W]
    columns,
    window,
    last_position,
    ORDER: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    size = tl.load(size_ptr + slot).to(tl.int32)
    size = tl.where(size <= columns, size, 0)
    offset = tl.load(offset_ptr + slot).to(tl.int32)
    if GIVEN:
        count = tl.load(given_ptr + slot).to(tl.int32)
    else:
        count = tl.minimum(tl.maximum(size - offset, 0), window)
    column = tl.arange(0, BLOCK)
    rank = _rank_of(offset + tl.where(column < count, column, 0), size, ORDER)
    rank = tl.minimum(tl.maximum(rank, 0), columns - 1)
    in_window = column < window
    token = tl.load(candidate_ptr + slot * columns + rank, mask=in_window, other=0)
    position = tl.minimum(tl.load(length_ptr + slot).to(tl.int32), last_position)
    tl.store(new_size_ptr + slot, size.to(tl.int64))
    tl.store(count_ptr + slot, count.to(tl.int64))
    at = slot * window + column
    tl.store(rank_ptr + at, rank.to(tl.int64), mask=in_window)
    tl.store(id_ptr + at, token, mask=in_window)
    tl.store(position_ptr + at, (tl.zeros_like(column) + position).to(tl.int64), mask=in_window)


@triton.jit
def _append(
    slot,
    token,
    logprob,
    size,
    rank,
    tried,
    verdict,
    held_logit,
    policy_logprob,
    reference,
    size_ptr,
    num_tokens_ptr,
    done_ptr,
    record_ptr,
    record_floats_ptr,
    eos_ptr,
    num_eos,
    most_tokens,
    BLOCK_E: tl.constexpr,
):
    """Emits a token; returns why the sequence has ended, or that it runs."""
    num_tokens = tl.load(num_tokens_ptr + slot).to(tl.int32)
    row = slot * most_tokens + tl.minimum(num_tokens, most_tokens - 1)
    tl.store(record_ptr + row * 5, token)
    tl.store(record_ptr + row * 5 + 1, size.to(tl.int64))
    tl.store(record_ptr + row * 5 + 2, rank.to(tl.int64))
    tl.store(record_ptr + row * 5 + 3, tried.to(tl.int64))
    tl.store(record_ptr + row * 5 + 4, verdict.to(tl.int64))
    tl.store(record_floats_ptr + row * 4, logprob)
    tl.store(record_floats_ptr + row * 4 + 1, held_logit)
    tl.store(record_floats_ptr + row * 4 + 2, policy_logprob)
    tl.store(record_floats_ptr + row * 4 + 3, reference)
    tl.store(num_tokens_ptr + slot, (num_tokens + 1).to(tl.int64))
    ends = tl.full((), 0, tl.int32)
    for start in range(0, num_eos, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        eos = tl.load(eos_ptr + e, mask=e < num_eos, other=-1)
        ends = tl.maximum(ends, tl.max((eos == token).to(tl.int32), axis=0))
    done = tl.where(ends > 0, _EOS, tl.load(done_ptr + slot).to(tl.int32))
    done = tl.where((num_tokens + 1 >= most_tokens) & (done == _RUNNING), _LENGTH, done)
    if done != _RUNNING:
        tl.store(done_ptr + slot, done.to(tl.int64))
        tl.store(size_ptr + slot, tl.full((), 0, tl.int64))
    return done


@triton.jit(
    do_not_specialize=["columns", "window", "logit_stride", "most_tokens", "num_eos"],
    do_not_specialize_on_alignment=_OF_SLOTS,
)
def settling(
    length_ptr,  # int64 [B]
    candidate_ptr,  # int64 [B, C]
    candidate_logprob_ptr,  # float32 [B, C]
    size_ptr,  # int64 [B]
    offset_ptr,  # int64 [B]
    held_accepted_ptr,  # bool [B]
    held_preference_ptr,  # float32 [B]
    log_residual_ptr,  # float32 [B]
    held_tried_ptr,  # int64 [B]
    held_logit_ptr,  # float32 [B]
    held_logprob_ptr,  # float32 [B]
    held_state_ptr,  # [B, H]
    num_tokens_ptr,  # int64 [B]
    num_forwards_ptr,  # int64 [B]
    done_ptr,  # int64 [B]
    record_ptr,  # int64 [B, N, 5]
    record_floats_ptr,  # float32 [B, N, 4]
    row_ptr,  # int64 [B], with the next six: of the decision
    decided_ptr,  # bool [B]
    invalid_ptr,  # bool [B]
    new_accepted_ptr,  # bool [B]
    new_preference_ptr,  # float32 [B]
    new_residual_ptr,  # float32 [B]
    log_prob_ptr,  # float32 [B, W]
    logit_ptr,  # float32 [B, W]
    state_ptr,  # [R, H]
    place_ptr,  # int64 [B, W]; PACKED: else not read
    count_ptr,  # int64 [B]
    eos_ptr,  # int64 [E]
    chosen_ptr,  # bool [B]
    columns,
    window,
    logit_stride,
    hidden_size,
    most_tokens,
    num_eos,
    ORDER: tl.constexpr,
    FALLBACK_IS_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + slot).to(tl.int32)
    offset = tl.load(offset_ptr + slot).to(tl.int32)
    num_forwards = tl.load(num_forwards_ptr + slot)
    tl.store(num_forwards_ptr + slot, num_forwards + (count > 0).to(tl.int64))

    # Hold the best candidate so far.
    row = tl.load(row_ptr + slot)
    accepted = tl.load(new_accepted_ptr + slot).to(tl.int1)
    residual = tl.load(new_residual_ptr + slot)
    tl.store(held_accepted_ptr + slot, accepted)
    tl.store(held_preference_ptr + slot, tl.load(new_preference_ptr + slot))
    tl.store(log_residual_ptr + slot, residual)
    tried = tl.load(held_tried_ptr + slot).to(tl.int32)
    held_logit = tl.load(held_logit_ptr + slot)
    held_logprob = tl.load(held_logprob_ptr + slot)
    if row >= 0:
        tried = offset + row.to(tl.int32)
        held_logit = tl.load(logit_ptr + slot * logit_stride + row)
        held_logprob = tl.load(log_prob_ptr + slot * window + row)
        tl.store(held_tried_ptr + slot, tried.to(tl.int64))
        tl.store(held_logit_ptr + slot, held_logit)
        tl.store(held_logprob_ptr + slot, held_logprob)
        place = slot * window + row
        if PACKED:
            place = tl.load(place_ptr + place)
        h = tl.arange(0, BLOCK_H)
        for start in range(0, hidden_size, BLOCK_H):
            is_in = start + h < hidden_size
            state = tl.load(state_ptr + place * hidden_size + start + h, mask=is_in)
            tl.store(held_state_ptr + slot * hidden_size + start + h, state, mask=is_in)

    # Emit it where the position is decided.
    invalid = tl.load(invalid_ptr + slot).to(tl.int1)
    decided = (tl.load(decided_ptr + slot).to(tl.int1)) & (invalid == 0)
    size = tl.load(size_ptr + slot).to(tl.int32)
    done = tl.load(done_ptr + slot).to(tl.int32)
    if invalid:
        done = tl.full((), _BAD_ACCEPT, tl.int32)
        tl.store(done_ptr + slot, done.to(tl.int64))
        tl.store(size_ptr + slot, tl.full((), 0, tl.int64))
    # A set of one was emitted when it was admitted.
    if decided & (size > 1):
        c = tl.arange(0, BLOCK_C)
        logprob_ptr = candidate_logprob_ptr + slot * columns
        top = tl.full((), float("-inf"), tl.float32)
        for start in range(0, columns, BLOCK_C):
            x = tl.load(logprob_ptr + start + c, mask=start + c < columns, other=float("-inf"))
            top = tl.maximum(top, tl.max(x, axis=0))
        total = tl.zeros((), tl.float32)
        for start in range(0, columns, BLOCK_C):
            # Columns behind the set hold -inf.
            x = tl.load(logprob_ptr + start + c, mask=start + c < columns, other=float("-inf"))
            total += tl.sum(tl.exp2((x - top) * _LOG2E), axis=0)
        rank = tl.minimum(tl.maximum(_rank_of(tried, size, ORDER), 0), columns - 1)
        logprob = tl.load(logprob_ptr + rank)
        # Eq. 6, and for what is the fallback also that all are rejected.
        is_fallback = accepted == 0
        if FALLBACK_IS_LAST:
            is_fallback = is_fallback | (tried == size - 1)
        higher = tl.maximum(held_logprob, residual)
        lower = tl.minimum(held_logprob, residual)
        # -inf - -inf is NaN.
        gap = tl.where(higher == float("-inf"), float("-inf"), lower - higher)
        either = higher + tl.log2(1.0 + tl.exp2(gap * _LOG2E)) / _LOG2E
        done = _append(
            slot,
            tl.load(candidate_ptr + slot * columns + rank),
            logprob,
            size,
            rank,
            tried,
            tl.where(accepted, _ACCEPTED, _FALLBACK),
            held_logit,
            tl.where(is_fallback, either, held_logprob),
            logprob - (top + tl.log2(total) / _LOG2E),
            size_ptr,
            num_tokens_ptr,
            done_ptr,
            record_ptr,
            record_floats_ptr,
            eos_ptr,
            num_eos,
            most_tokens,
            BLOCK_E,
        )
    length = tl.load(length_ptr + slot)
    tl.store(length_ptr + slot, length + decided.to(tl.int64))
    tl.store(offset_ptr + slot, tl.where(decided, 0, offset + count).to(tl.int64))
    tl.store(chosen_ptr + slot, decided & (done == _RUNNING))


@triton.jit(
    do_not_specialize=["columns", "new_columns", "most_tokens", "num_eos", "verdict"],
    do_not_specialize_on_alignment=_OF_SLOTS,
)
def admitting(
    candidate_ptr,  # int64 [B, C]
    candidate_logprob_ptr,  # float32 [B, C]
    size_ptr,  # int64 [B]
    held_tried_ptr,  # int64 [B]
    held_logit_ptr,  # float32 [B]
    num_tokens_ptr,  # int64 [B]
    done_ptr,  # int64 [B]
    record_ptr,  # int64 [B, N, 5]
    record_floats_ptr,  # float32 [B, N, 4]
    new_id_ptr,  # int64 [B, D]
    new_logprob_ptr,  # float32 [B, D]
    new_size_ptr,  # int64 [B]
    chosen_ptr,  # bool [B]
    eos_ptr,  # int64 [E]
    columns,
    new_columns,
    most_tokens,
    num_eos,
    verdict,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    if tl.load(chosen_ptr + slot).to(tl.int1):
        size = tl.load(new_size_ptr + slot).to(tl.int32)
        # It has to be made anew with more columns.
        size = tl.where(size > new_columns, columns + 1, size)
        tl.store(size_ptr + slot, size.to(tl.int64))
        c = tl.arange(0, BLOCK_C)
        for start in range(0, columns, BLOCK_C):
            at = start + c
            is_new = at < new_columns
            token = tl.load(new_id_ptr + slot * new_columns + at, mask=is_new, other=0)
            logprob = tl.load(
                new_logprob_ptr + slot * new_columns + at, mask=is_new, other=float("-inf")
            )
            tl.store(candidate_ptr + slot * columns + at, token, mask=at < columns)
            tl.store(candidate_logprob_ptr + slot * columns + at, logprob, mask=at < columns)
        if size == 0:
            tl.store(done_ptr + slot, tl.full((), _BAD_LOGITS, tl.int64))
        zero, nan = tl.full((), 0, tl.int32), tl.full((), float("nan"), tl.float32)
        tl.store(held_tried_ptr + slot, zero.to(tl.int64))
        tl.store(held_logit_ptr + slot, nan)
        if size == 1:
            _append(
                slot,
                tl.load(new_id_ptr + slot * new_columns),
                tl.load(new_logprob_ptr + slot * new_columns),
                size,
                zero,
                zero,
                zero + verdict,
                nan,
                nan,
                nan,
                size_ptr,
                num_tokens_ptr,
                done_ptr,
                record_ptr,
                record_floats_ptr,
                eos_ptr,
                num_eos,
                most_tokens,
                BLOCK_E,
            )


@triton.jit(do_not_specialize=["base"])
def keeping(
    rows_ptr,  # [L, B, K, S, width]
    row_ptr,  # int64 [B]
    destination_ptr,  # int64 [B]
    layer_stride,
    slot_stride,
    head_stride,
    row_stride,
    num_heads,
    width,
    base,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(row_ptr + slot)
    if row >= 0:
        head = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
        d = tl.arange(0, BLOCK_D)
        is_in = (head < num_heads)[:, None] & (d < width)[None, :]
        rows_ptr += layer * layer_stride + slot * slot_stride
        at = head[:, None].to(tl.int64) * head_stride + d[None, :]
        kept = tl.load(rows_ptr + (base + row) * row_stride + at, mask=is_in)
        destination = tl.load(destination_ptr + slot)
        tl.store(rows_ptr + destination * row_stride + at, kept, mask=is_in)


def propose(
    slots: Slots, *, window: int, count: Tensor | None, last_position: int, order: Order
) -> Proposal:
    """The launch; arguments as those of the operation."""
    num_slots, columns = slots.candidate_ids.shape

    def ints(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.int64, device=slots.size.device)

    matrix = num_slots, window
    proposal = Proposal(
        size=ints(num_slots),
        count=ints(num_slots),
        rank=ints(*matrix),
        ids=ints(*matrix),
        positions=ints(*matrix),
    )
    proposing[(num_slots,)](
        slots.length,
        slots.size,
        slots.offset,
        slots.candidate_ids,
        slots.size if count is None else count.contiguous(),
        proposal.size,
        proposal.count,
        proposal.rank,
        proposal.ids,
        proposal.positions,
        columns,
        window,
        last_position,
        ORDER=order,
        GIVEN=count is not None,
        BLOCK=max(2, triton.next_power_of_2(window)),
        num_warps=1,
    )
    return proposal


def settle(
    slots: Slots,
    scored: Scored,
    decision: Decision,
    *,
    order: Order,
    fallback_is_last: bool,
    eos_ids: Tensor,
) -> Tensor:
    """The launch; arguments as those of the operation."""
    num_slots, columns = slots.candidate_ids.shape
    logit, hidden = scored.accept_logit, scored.hidden.contiguous()
    if logit.stride(1) != 1:
        logit = logit.contiguous()
    # As much of a state at once as registers hold: a warp alone waits for each load. Without loads
    # of 16 bytes they hold less.
    most = _BLOCK // 2 if hidden.shape[1] % 16 else 8192 // hidden.element_size()
    chosen = torch.empty(num_slots, dtype=torch.bool, device=logit.device)
    settling[(num_slots,)](
        slots.length,
        slots.candidate_ids,
        slots.candidate_logprobs,
        slots.size,
        slots.offset,
        slots.held_accepted,
        slots.held_preference,
        slots.log_residual,
        slots.held_tried,
        slots.held_logit,
        slots.held_logprob,
        slots.hidden,
        slots.num_tokens,
        slots.num_forwards,
        slots.done,
        slots.record,
        slots.record_floats,
        *(tensor.contiguous() for tensor in decision[:3]),
        *(tensor.contiguous() for tensor in decision.held),
        decision.log_prob.contiguous(),
        logit,
        hidden,
        scored.count if scored.place is None else scored.place.contiguous(),
        scored.count.contiguous(),
        eos_ids,
        chosen,
        columns,
        logit.shape[1],
        logit.stride(0),
        hidden.shape[1],
        slots.record.shape[1],
        eos_ids.shape[0],
        ORDER=order,
        FALLBACK_IS_LAST=fallback_is_last,
        PACKED=scored.place is not None,
        BLOCK_C=_block(columns),
        BLOCK_H=min(most, triton.next_power_of_2(hidden.shape[1])),
        BLOCK_E=_block(eos_ids.shape[0]),
        num_warps=1,
    )
    return chosen


def admit(
    slots: Slots,
    new: CandidateSet,
    chosen: Tensor,
    *,
    verdict: int,
    order: Order,
    eos_ids: Tensor,
) -> None:
    """The launch; arguments as those of the operation. In any order a set of one has rank 0."""
    num_slots, columns = slots.candidate_ids.shape
    admitting[(num_slots,)](
        slots.candidate_ids,
        slots.candidate_logprobs,
        slots.size,
        slots.held_tried,
        slots.held_logit,
        slots.num_tokens,
        slots.done,
        slots.record,
        slots.record_floats,
        *(tensor.contiguous() for tensor in new),
        chosen.contiguous(),
        eos_ids,
        columns,
        new.ids.shape[1],
        slots.record.shape[1],
        eos_ids.shape[0],
        verdict,
        BLOCK_C=_block(columns),
        BLOCK_E=_block(eos_ids.shape[0]),
        num_warps=1,
    )


def keep_rows(rows: Tensor, row: Tensor, *, base: int, destination: Tensor, trash: int) -> None:
    """The launch; arguments as those of the operation. Nothing is written to the trash."""
    num_layers, num_slots, num_heads, _, width = rows.shape
    block_d = triton.next_power_of_2(width)
    block_k = min(triton.next_power_of_2(num_heads), max(1, _BLOCK // block_d))
    keeping[(num_layers, num_slots, triton.cdiv(num_heads, block_k))](
        rows,
        row.contiguous(),
        destination.contiguous(),
        *rows.stride()[:4],
        num_heads,
        width,
        base,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=4,
    )


def _block(size: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(max(2, size)))
