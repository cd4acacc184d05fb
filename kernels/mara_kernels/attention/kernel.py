"""Candidate attention in Triton: one pass over a slot's prefix for all its new rows and head group.

    program (tile of rows, split; key head; slot):
        rows  = (new row, head of the group), packed: keys are read once for all of them
        start from the row itself (siblings), or walk over the new rows under the tree's mask
        walk over this split's part of the prefix, online softmax
    splits > 1: parts of (output, log-sum-exp), merged by ``combine``

A sibling sees no other new row: its own term is computed beside the products, so that not even a
NaN reaches its neighbours. Rows of the cache behind a slot's length are never read.

Shapes: B slots, W new rows, Hq query heads, Hkv key heads, G = Hq / Hkv, M = W G packed rows,
S positions, D head size, Dv value head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.attention.rows import NewRows
from mara_kernels.configs import attention_config

_LOG2E = tl.constexpr(1.4426950408889634)
# By dtype, the largest head size: a larger one of float32 does not fit the registers.
_MAX_HEAD_SIZE = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
_MAX_SPLITS = 64


@triton.jit
def _scores(product, scale, softcap, SOFTCAP: tl.constexpr):
    """Products to scores, in units of log2."""
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1
        x = product * (scale / softcap)
        return softcap * _LOG2E * (2.0 / (1.0 + tl.exp2(-2.0 * _LOG2E * x)) - 1.0)
    return product * (scale * _LOG2E)


@triton.jit
def _load_block(
    key_ptr,
    value_ptr,
    row,
    is_key,
    key_stride_s,
    value_stride_s,
    d,
    dv,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Keys [D, keys] and values [keys, Dv] of cache rows."""
    row = row.to(tl.int64)
    key = tl.load(
        key_ptr + row[None, :] * key_stride_s + d[:, None],
        mask=is_key[None, :] & (d[:, None] < D),
        other=0.0,
    )
    value = tl.load(
        value_ptr + row[:, None] * value_stride_s + dv[None, :],
        mask=is_key[:, None] & (dv[None, :] < DV),
        other=0.0,
    )
    return key, value


@triton.jit
def _online(score, value, top, total, output, PRECISION: tl.constexpr):
    """One block of the online softmax: score [rows, keys] (-inf: unseen), value [keys, Dv]."""
    new_top = tl.maximum(top, tl.max(score, axis=1))
    # A row that has seen nothing yet: -inf - -inf is NaN.
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - origin[:, None])
    decay = tl.exp2(top - origin)
    total = total * decay + tl.sum(weight, axis=1)
    output = output * decay[:, None]
    output = tl.dot(weight.to(value.dtype), value, output, input_precision=PRECISION)
    return new_top, total, output


@triton.jit(
    do_not_specialize=["num_rows", "base", "window", "num_splits"],
    # A run's slots may begin anywhere in the lengths.
    do_not_specialize_on_alignment=["lengths_ptr"],
)
def attend(
    query_ptr,  # [B, Hq, W, D]
    key_ptr,  # [B, Hkv, S, D]
    value_ptr,  # [B, Hkv, S, Dv]
    output_ptr,  # PARTS: float32 [B, Hkv, splits, M, Dv], else [B, W, Hq, Dv]
    lse_ptr,  # PARTS: float32 [B, Hkv, splits, M], in units of log2
    lengths_ptr,  # int64 [B]
    ancestors_ptr,  # int64 [W], bit u: the row sees row u
    depths_ptr,  # int64 [W]
    sinks_ptr,  # [Hq]
    query_stride_b,
    query_stride_h,
    query_stride_w,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    num_rows,
    num_kv_heads,
    base,
    window,
    num_splits,
    scale,
    softcap,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    tile = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1)
    slot = tl.program_id(2).to(tl.int64)
    num_packed = num_rows * GROUP
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = packed < num_packed
    row = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    first_row, last_row = (tile * BLOCK_M) // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP
    is_last = split == num_splits - 1

    query_ptr += slot * query_stride_b
    key_ptr += slot * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value_ptr += slot * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    query = tl.load(
        query_ptr
        + head[:, None] * query_stride_h
        + row[:, None].to(tl.int64) * query_stride_w
        + d[None, :],
        mask=is_row[:, None] & (d[None, :] < D),
        other=0.0,
    )
    length = tl.load(lengths_ptr + slot).to(tl.int32)
    if KIND == "siblings":
        depth = tl.zeros_like(row)
    elif KIND == "chain":
        depth = row
    else:
        depth = tl.load(depths_ptr + row, mask=is_row, other=0).to(tl.int32)

    if KIND == "siblings":
        # The row itself, in the last split.
        mine = is_row & is_last
        own_at = (base + row).to(tl.int64)[:, None]
        own_key = tl.load(
            key_ptr + own_at * key_stride_s + d[None, :],
            mask=mine[:, None] & (d[None, :] < D),
            other=0.0,
        )
        product = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), axis=1)
        top = tl.where(mine, _scores(product, scale, softcap, SOFTCAP), float("-inf"))
        total = tl.where(mine, 1.0, 0.0)
        output = tl.load(
            value_ptr + own_at * value_stride_s + dv[None, :],
            mask=mine[:, None] & (dv[None, :] < DV),
            other=0.0,
        ).to(tl.float32)
    else:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        output = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)

    # The prefix.
    start = 0
    if WINDOW:
        # The tile's first row of a chain reaches back farthest; of a tree any may.
        shallowest = first_row if KIND == "chain" else 0
        start = tl.maximum(length + shallowest - window + 1, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(tl.maximum(length - start, 0), BLOCK_N)
    per_split = tl.cdiv(blocks, num_splits)
    low = start + split * per_split * BLOCK_N
    high = tl.minimum(low + per_split * BLOCK_N, length)
    for block in range(low, high, BLOCK_N):
        position = block + n
        is_key = position < length
        key, value = _load_block(
            key_ptr, value_ptr, position, is_key, key_stride_s, value_stride_s, d, dv, D, DV
        )
        score = tl.dot(query, key, input_precision=PRECISION)
        score = _scores(score, scale, softcap, SOFTCAP)
        seen = is_key[None, :]
        if WINDOW:
            seen = seen & (length + depth[:, None] - position[None, :] < window)
        score = tl.where(seen, score, float("-inf"))
        top, total, output = _online(score, value, top, total, output, PRECISION)

    if KIND != "siblings":
        # The new rows, in the last split.
        end = num_rows
        if KIND == "chain":
            end = tl.minimum(last_row + 1, num_rows)
        else:
            bits = tl.load(ancestors_ptr + row, mask=is_row, other=0)
        for block in tl.range(0, tl.where(is_last, end, 0), BLOCK_N, num_stages=1):
            other = block + n
            is_key = other < num_rows
            key, value = _load_block(
                key_ptr, value_ptr, base + other, is_key, key_stride_s, value_stride_s, d, dv, D, DV
            )
            score = tl.dot(query, key, input_precision=PRECISION)
            score = _scores(score, scale, softcap, SOFTCAP)
            if KIND == "chain":
                seen = other[None, :] <= row[:, None]
                other_depth = other
            else:
                seen = ((bits[:, None] >> other[None, :].to(tl.int64)) & 1) != 0
                other_depth = tl.load(depths_ptr + other, mask=is_key, other=0).to(tl.int32)
            seen = seen & is_key[None, :]
            if WINDOW:
                seen = seen & (depth[:, None] - other_depth[None, :] < window)
            score = tl.where(seen, score, float("-inf"))
            top, total, output = _online(score, value, top, total, output, PRECISION)

    if PARTS:
        part = (slot * num_kv_heads + kv_head) * num_splits + split
        at = part * num_packed + packed
        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output_ptr + at[:, None] * DV + dv[None, :],
            output,
            mask=is_row[:, None] & (dv[None, :] < DV),
        )
        tl.store(lse_ptr + at, top + tl.log2(total), mask=is_row)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
            new_top = tl.maximum(top, sink)
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.exp2(sink - new_top)
            output = output * decay[:, None]
        output = output / tl.where(is_row, total, 1.0)[:, None]
        num_heads = num_kv_heads * GROUP
        at = (slot * num_rows + row) * num_heads + head
        tl.store(
            output_ptr + at[:, None] * DV + dv[None, :],
            output.to(output_ptr.dtype.element_ty),
            mask=is_row[:, None] & (dv[None, :] < DV),
        )


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def combine(
    parts_ptr,  # float32 [B, Hkv, splits, M, Dv]
    lse_ptr,  # float32 [B, Hkv, splits, M], in units of log2
    output_ptr,  # [B, W, Hq, Dv]
    sinks_ptr,  # [Hq]
    num_rows,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    packed, kv_head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_packed = num_rows * GROUP
    head = kv_head * GROUP + packed % GROUP
    split, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    is_split = split < num_splits
    at = ((slot * num_kv_heads + kv_head) * num_splits + split) * num_packed + packed
    lse = tl.load(lse_ptr + at, mask=is_split, other=float("-inf"))
    # The last split saw the row itself, or a NaN: there is something to weigh.
    top = tl.max(lse, axis=0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        top = tl.maximum(top, sink)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, axis=0)
    if SINKS:
        total += tl.exp2(sink - top)
    part = tl.load(
        parts_ptr + at[:, None] * DV + dv[None, :],
        mask=is_split[:, None] & (dv[None, :] < DV),
        other=0.0,
    )
    output = tl.sum(part * weight[:, None], axis=0) / total
    at = (slot * num_rows + packed // GROUP) * num_kv_heads * GROUP + head
    tl.store(output_ptr + at * DV + dv, output.to(output_ptr.dtype.element_ty), mask=dv < DV)


def covers(query: Tensor, key: Tensor, value: Tensor, rows: NewRows) -> bool:
    """Whether :func:`attention_triton` takes these."""
    return (
        query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= _MAX_HEAD_SIZE.get(query.dtype, 0)
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        and (rows.tree.kind != "tree" or rows.tree.bits is not None)
    )


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: NewRows,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    architecture: str,
    num_processors: int,
    num_splits: int | None = None,
) -> Tensor:
    """The launches; arguments as those of the operation. ``num_splits``: None fills the device."""
    num_slots, num_heads, num_rows, head_size = query.shape
    num_kv_heads, value_size = key.shape[1], value.shape[-1]
    group = num_heads // num_kv_heads
    num_packed = num_rows * group
    block_d = max(16, triton.next_power_of_2(head_size))
    block_dv = max(16, triton.next_power_of_2(value_size))
    config = attention_config(architecture, query.dtype, max(block_d, block_dv), num_packed)
    tiles = triton.cdiv(num_packed, config.block_m)
    if num_splits is None:
        reach = rows.base if sliding_window is None else min(rows.base, sliding_window)
        wanted = config.programs * num_processors // max(1, tiles * num_kv_heads * num_slots)
        # Below two blocks of keys a part is not worth merging.
        num_splits = max(1, min(wanted, reach // (2 * config.block_n), _MAX_SPLITS))
    device = query.device
    output = torch.empty(
        num_slots, num_rows, num_heads, value_size, dtype=query.dtype, device=device
    )
    has_sinks = sinks is not None
    sinks = sinks.contiguous() if sinks is not None else output
    parts, lse = output, output
    if num_splits > 1:
        size = num_slots, num_kv_heads, num_splits, num_packed
        parts = torch.empty(*size, value_size, device=device)
        lse = torch.empty(size, device=device)
    tree = rows.tree
    attend[(tiles * num_splits, num_kv_heads, num_slots)](
        query,
        key,
        value,
        parts,
        lse,
        # No strides are passed for these.
        rows.lengths.contiguous(),
        tree.depths if tree.bits is None else tree.bits.contiguous(),
        tree.depths.contiguous(),
        sinks,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        key.stride(0),
        key.stride(1),
        key.stride(2),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        num_rows,
        num_kv_heads,
        rows.base,
        sliding_window or 0,
        num_splits,
        # A Python int would be compiled as one.
        float(scale),
        float(softcap or 0.0),
        KIND=tree.kind,
        GROUP=group,
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        SINKS=has_sinks,
        PARTS=num_splits > 1,
        PRECISION=config.precision,
        D=head_size,
        DV=value_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_splits > 1:
        combine[(num_packed, num_kv_heads, num_slots)](
            parts,
            lse,
            output,
            sinks,
            num_rows,
            num_kv_heads,
            num_splits,
            GROUP=group,
            SINKS=has_sinks,
            DV=value_size,
            BLOCK_DV=block_dv,
            BLOCK_S=triton.next_power_of_2(num_splits),
            num_warps=1 if block_dv <= 128 else 2,
        )
    return output.transpose(1, 2)
