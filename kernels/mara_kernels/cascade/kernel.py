"""The cascade in Triton: the definition of :mod:`reference`, one warp per slot.

Shapes: B slots, W window; columns of a block beyond W are outside every set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.cascade.reference import CascadeRule, Decision, Held

MAX_WINDOW = 512
"""Candidates that fit the registers of a warp."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log_sigmoid(x):
    """log(1 / (1 + exp(-x))), to the last digits for all x: log1p without a library."""
    small = tl.exp2(-tl.abs(x) * _LOG2E)
    sum = 1.0 + small
    # Kahan: the rounding of the sum is divided out again.
    ratio = tl.div_rn(small, tl.where(sum == 1.0, 1.0, sum - 1.0))
    log1p = tl.where(sum == 1.0, small, (tl.log2(sum) / _LOG2E) * ratio)
    return tl.minimum(x, 0.0) - log1p


@triton.jit(do_not_specialize=["window", "logit_stride", "seed_low", "seed_high"])
def decide(
    logit_ptr,  # float32 [B, W]
    offset_ptr,  # int64 [B]
    size_ptr,  # int64 [B]
    held_accepted_ptr,  # bool [B]
    held_preference_ptr,  # float32 [B]
    log_residual_ptr,  # float32 [B]
    sequence_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    count_ptr,  # int64 [B]
    row_ptr,  # int64 [B]
    decided_ptr,  # bool [B]
    invalid_ptr,  # bool [B]
    new_accepted_ptr,  # bool [B]
    new_preference_ptr,  # float32 [B]
    new_residual_ptr,  # float32 [B]
    log_prob_ptr,  # float32 [B, W]
    window,
    logit_stride,
    threshold_logit,
    seed_low,
    seed_high,
    SAMPLED: tl.constexpr,
    STRATEGY: tl.constexpr,
    FALLBACK: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    in_window = column < window
    count = tl.load(count_ptr + slot).to(tl.int32)
    width = tl.minimum(tl.maximum(count, 0), window)
    has_row = column < width
    d = tl.load(logit_ptr + slot * logit_stride + column, mask=has_row, other=0.0)
    offset = tl.load(offset_ptr + slot).to(tl.int32)
    size = tl.load(size_ptr + slot).to(tl.int32)
    tried = offset + column
    inside = has_row & (tried < size)
    forced = size == 1

    if SAMPLED or STRATEGY == "random":
        if ORDER == "reverse":
            rank = size - 1 - tried
        elif ORDER == "top_last":
            rank = tl.where(tried == size - 1, 0, tried + 1)
        else:
            rank = tried
        sequence = tl.load(sequence_ptr + slot)
        position = tl.load(position_ptr + slot).to(tl.int32)
        draw_word, key_word, _, _ = tl.philox_impl(
            rank.to(tl.uint32, bitcast=True),
            (tl.zeros_like(rank) + position).to(tl.uint32, bitcast=True),
            (tl.zeros_like(rank) + (sequence & 0xFFFFFFFF)).to(tl.uint32),
            (tl.zeros_like(rank) + (sequence >> 32)).to(tl.uint32),
            seed_low.to(tl.uint32, bitcast=True),
            seed_high.to(tl.uint32, bitcast=True),
        )
    shifted = d - threshold_logit
    if SAMPLED:
        draw = (draw_word >> 8).to(tl.float32) * 5.9604644775390625e-08
        accepted = draw < 1.0 / (1.0 + tl.exp2(-shifted * _LOG2E))
    else:
        accepted = d > threshold_logit
    accepted = (accepted | forced) & inside

    # What is held is reset where the position begins.
    first = offset == 0
    held_accepted = (tl.load(held_accepted_ptr + slot).to(tl.int1)) & (first == 0)
    held_preference = tl.load(held_preference_ptr + slot)
    held_preference = tl.where(first, float("-inf"), held_preference)
    residual = tl.where(first, 0.0, tl.load(log_residual_ptr + slot))

    if STRATEGY == "first":
        when_accepted = (-tried).to(tl.float32)
    elif STRATEGY == "max_prob":
        when_accepted = d
    else:
        when_accepted = (key_word >> 8).to(tl.float32) * 5.9604644775390625e-08
    if FALLBACK == "first":
        when_rejected = (-tried).to(tl.float32)
    elif FALLBACK == "last":
        when_rejected = tried.to(tl.float32)
    else:
        when_rejected = d
    any_accepted = tl.max(accepted.to(tl.int32), axis=0) > 0
    any_inside = tl.max(inside.to(tl.int32), axis=0) > 0
    eligible = tl.where(any_accepted, accepted, inside)
    preference = tl.where(any_accepted, when_accepted, when_rejected)
    # NaN is preferred to nothing.
    preference = tl.where(eligible & (preference == preference), preference, float("-inf"))
    best = tl.max(preference, axis=0)
    row = tl.min(tl.where(preference == best, column, BLOCK), axis=0)
    better = (any_accepted & (held_accepted == 0)) | (
        (any_accepted == held_accepted) & (best > held_preference)
    )
    better = better & any_inside

    ends = offset + width >= size
    asked = inside & (forced == 0)
    if STRATEGY == "first":
        ends = ends | any_accepted
        first_accepted = tl.min(tl.where(accepted, column, BLOCK), axis=0)
        asked = asked & (column < first_accepted)
    decided = any_inside & ends
    # Only a candidate that the sequential cascade would have asked can be invalid.
    invalid = tl.max(((d != d) & asked).to(tl.int32), axis=0) > 0

    # Eq. 6: accepted, and everything before rejected. The sum up to the one before is made of the
    # logits before, not by subtraction: a certain candidate would cancel it away.
    is_before = (column >= 1) & (column <= width) & (tried - 1 < size)
    d_before = tl.load(logit_ptr + slot * logit_stride + column - 1, mask=is_before, other=0.0)
    log_reject = tl.where(is_before, _log_sigmoid(threshold_logit - d_before), 0.0)
    log_rejected = residual + tl.cumsum(log_reject, axis=0)
    log_prob = tl.where(inside, _log_sigmoid(shifted) + log_rejected, float("-inf"))
    residual += tl.sum(tl.where(inside, _log_sigmoid(-shifted), 0.0), axis=0)

    tl.store(row_ptr + slot, tl.where(better, row, -1).to(tl.int64))
    tl.store(decided_ptr + slot, decided)
    tl.store(invalid_ptr + slot, invalid)
    tl.store(new_accepted_ptr + slot, tl.where(better, any_accepted, held_accepted))
    tl.store(new_preference_ptr + slot, tl.where(better, best, held_preference))
    tl.store(new_residual_ptr + slot, residual)
    tl.store(log_prob_ptr + slot * window + column, log_prob, mask=in_window)


def cascade_triton(
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
    """The launch; arguments as those of the operation."""
    num_slots, window = accept_logit_BW.shape
    device = accept_logit_BW.device
    if window > 1 and accept_logit_BW.stride(1) != 1:
        accept_logit_BW = accept_logit_BW.contiguous()

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    decision = Decision(
        row=empty(num_slots, dtype=torch.int64),
        decided=empty(num_slots, dtype=torch.bool),
        invalid=empty(num_slots, dtype=torch.bool),
        held=Held(
            empty(num_slots, dtype=torch.bool),
            empty(num_slots, dtype=torch.float32),
            empty(num_slots, dtype=torch.float32),
        ),
        log_prob=empty(num_slots, window, dtype=torch.float32),
    )
    # No strides are passed for them.
    decide[(num_slots,)](
        accept_logit_BW,
        offset.contiguous(),
        size.contiguous(),
        *(tensor.contiguous() for tensor in held),
        sequence.contiguous(),
        position.contiguous(),
        count.contiguous(),
        decision.row,
        decision.decided,
        decision.invalid,
        *decision.held,
        decision.log_prob,
        window,
        accept_logit_BW.stride(0),
        rule.threshold_logit,
        _signed(rule.seed & 0xFFFFFFFF),
        _signed(rule.seed >> 32),
        SAMPLED=rule.acceptance == "sample",
        STRATEGY=rule.strategy,
        FALLBACK=rule.fallback,
        ORDER=rule.order,
        BLOCK=max(2, triton.next_power_of_2(window)),
        num_warps=1,
    )
    return decision


def _signed(word: int) -> int:
    """32 bits as a number of the type that every seed then has: one compiled kernel for all."""
    return word - (1 << 32) if word >> 31 else word
