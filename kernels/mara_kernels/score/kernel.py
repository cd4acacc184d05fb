"""Scoring in Triton: the accept model as matrix products of raw states, float32 sums.

Few states (the decode step): the weights are what has to be read, so H is split over programs.

1. ``first_layer``   [S, N, I] partial products, and in further programs each row's mean and rstd
2. ``other_layers``  [C, N, J]: sums the parts, folded layer norm, ReLU, times a slice of W2
3. ``finish``        [N]: sums the slices, ReLU, dot product

Many states (training): ``row_stats``, ``first_layer`` with the layer norm and ReLU at its end,
``other_layers`` with the rest at its end.

Shapes: N states, H hidden, I inner size, J = I/4, S splits of H, C slices of I.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.configs import score_config
from mara_kernels.score.fold import ALIGNMENT, FoldedParameters, pad_columns

_STATS_BLOCK = 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _store_row_stats(
    states_ptr, stats_ptr, row, stride, hidden_size, norm_eps, BLOCK: tl.constexpr
):
    """Mean and 1/std of a row, in two passes: one would lose a small variance behind a mean."""
    states_ptr += row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden_size, BLOCK):
        at = start + column
        total += tl.load(states_ptr + at, mask=at < hidden_size, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / hidden_size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden_size, BLOCK):
        at = start + column
        x = tl.load(states_ptr + at, mask=at < hidden_size, other=0.0).to(tl.float32)
        x = tl.where(at < hidden_size, x - mean, 0.0)
        total += x * x
    variance = tl.sum(total, axis=0) / hidden_size
    tl.store(stats_ptr + row * 2, mean)
    tl.store(stats_ptr + row * 2 + 1, tl.div_rn(1.0, tl.sqrt_rn(variance + norm_eps)))


@triton.jit
def row_stats(
    states_ptr,  # [N, H]
    stats_ptr,  # float32 [N, 2]: mean, rstd
    stride,
    hidden_size,
    norm_eps,
    BLOCK: tl.constexpr,
):
    _store_row_stats(states_ptr, stats_ptr, tl.program_id(0), stride, hidden_size, norm_eps, BLOCK)


@triton.jit
def _normed(x, row_in, stats_ptr, row, column_sums, bias):
    """relu(layer norm, folded) of raw first-layer products x [rows, columns]."""
    mean = tl.load(stats_ptr + row * 2, mask=row_in, other=0.0)
    rstd = tl.load(stats_ptr + row * 2 + 1, mask=row_in, other=0.0)
    x = rstd[:, None] * (x - mean[:, None] * column_sums[None, :]) + bias[None, :]
    # Not maximum(): NaN must stay NaN.
    return tl.where(x < 0.0, 0.0, x)


@triton.jit(do_not_specialize=["num_states"])
def first_layer(
    states_ptr,  # [N, width], H columns and zeros
    weight_ptr,  # [I, width]
    column_sums_ptr,  # float32 [I]
    bias_ptr,  # float32 [I]
    stats_ptr,  # float32 [N, 2]
    output_ptr,  # SPLITS > 1: float32 [S, N, I], raw parts; else [N, I], after ReLU
    num_states,
    stride,
    width,
    hidden_size,
    inner_size,
    norm_eps,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_i = tl.cdiv(inner_size, BLOCK_I)
    num_tiles = tiles_i * tl.cdiv(num_states, BLOCK_N) * SPLITS
    if program >= num_tiles:
        _store_row_stats(
            states_ptr,
            stats_ptr,
            program - num_tiles,
            stride,
            hidden_size,
            norm_eps,
            STATS_BLOCK,
        )
    else:
        # Programs that share weights are neighbours where weights are what is read.
        split = program % SPLITS
        tile = program // SPLITS
        i = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        row = (tile // tiles_i) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_in, i_in = row < num_states, i < inner_size
        blocks = tl.cdiv(width, BLOCK_H)
        per_split = tl.cdiv(blocks, SPLITS)
        start = split * per_split
        h = tl.arange(0, BLOCK_H)
        x_ptr = states_ptr + row[:, None].to(tl.int64) * stride + h[None, :]
        w_ptr = weight_ptr + i[None, :] * width + h[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        for block in range(start, tl.minimum(start + per_split, blocks)):
            at = block * BLOCK_H
            if EVEN_H:
                x = tl.load(x_ptr + at, mask=row_in[:, None], other=0.0)
                w = tl.load(w_ptr + at, mask=i_in[None, :], other=0.0)
            else:
                x = tl.load(x_ptr + at, mask=row_in[:, None] & (at + h[None, :] < width), other=0.0)
                w = tl.load(w_ptr + at, mask=i_in[None, :] & (at + h[:, None] < width), other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
        at = row[:, None].to(tl.int64) * inner_size + i[None, :]
        mask = row_in[:, None] & i_in[None, :]
        if SPLITS > 1:
            at += split.to(tl.int64) * num_states * inner_size
            tl.store(output_ptr + at, total, mask=mask)
        else:
            sums = tl.load(column_sums_ptr + i, mask=i_in, other=0.0)
            bias = tl.load(bias_ptr + i, mask=i_in, other=0.0)
            total = _normed(total, row_in, stats_ptr, row, sums, bias)
            tl.store(output_ptr + at, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_states"])
def other_layers(
    input_ptr,  # what first_layer wrote
    stats_ptr,  # float32 [N, 2]
    column_sums_ptr,  # float32 [I]
    bias1_ptr,  # float32 [I]
    weight2_ptr,  # [J, I]
    bias2_ptr,  # float32 [J]
    weight3_ptr,  # float32 [J]
    bias3_ptr,  # float32 [1]
    output_ptr,  # SLICES > 1: float32 [C, N, J], parts; else float32 [N], d
    num_states,
    inner_size,
    num_outputs,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = row < num_states
    j = tl.arange(0, BLOCK_J)
    j_in = j < num_outputs
    part = tl.program_id(1)
    blocks = tl.cdiv(inner_size, BLOCK_I)
    per_slice = tl.cdiv(blocks, SLICES)
    start = part * per_slice
    total = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for block in range(start, tl.minimum(start + per_slice, blocks)):
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        i_in = i < inner_size
        at = row[:, None].to(tl.int64) * inner_size + i[None, :]
        mask = row_in[:, None] & i_in[None, :]
        if SPLITS > 1:
            raw = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
            for split in tl.static_range(SPLITS):
                offset = split * num_states.to(tl.int64) * inner_size
                raw += tl.load(input_ptr + offset + at, mask=mask, other=0.0)
            sums = tl.load(column_sums_ptr + i, mask=i_in, other=0.0)
            bias = tl.load(bias1_ptr + i, mask=i_in, other=0.0)
            x = _normed(raw, row_in, stats_ptr, row, sums, bias)
            x = x.to(weight2_ptr.dtype.element_ty)
        else:
            x = tl.load(input_ptr + at, mask=mask, other=0.0)
        w = tl.load(
            weight2_ptr + j[None, :] * inner_size + i[:, None],
            mask=j_in[None, :] & i_in[:, None],
            other=0.0,
        )
        total = tl.dot(x, w, total, input_precision="ieee")
    if SLICES > 1:
        at = (part.to(tl.int64) * num_states + row[:, None]) * num_outputs + j[None, :]
        tl.store(output_ptr + at, total, mask=row_in[:, None] & j_in[None, :])
    else:
        d = _last(total, bias2_ptr, weight3_ptr, bias3_ptr, j, j_in)
        tl.store(output_ptr + row, d, mask=row_in)


@triton.jit
def _last(x, bias2_ptr, weight3_ptr, bias3_ptr, j, j_in):
    """d of second-layer products x [rows, J]."""
    x += tl.load(bias2_ptr + j, mask=j_in, other=0.0)[None, :]
    x = tl.where(x < 0.0, 0.0, x)
    weight3 = tl.load(weight3_ptr + j, mask=j_in, other=0.0)
    return tl.sum(x * weight3[None, :], axis=1) + tl.load(bias3_ptr)


@triton.jit(do_not_specialize=["num_states"])
def finish(
    parts_ptr,  # float32 [C, N, J]
    bias2_ptr,
    weight3_ptr,
    bias3_ptr,
    output_ptr,  # float32 [N]
    num_states,
    num_outputs,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = row < num_states
    j = tl.arange(0, BLOCK_J)
    j_in = j < num_outputs
    total = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for part in tl.static_range(SLICES):
        at = (part * num_states.to(tl.int64) + row[:, None]) * num_outputs + j[None, :]
        total += tl.load(parts_ptr + at, mask=row_in[:, None] & j_in[None, :], other=0.0)
    d = _last(total, bias2_ptr, weight3_ptr, bias3_ptr, j, j_in)
    tl.store(output_ptr + row, d, mask=row_in)


def covers(states: Tensor, inner_size: int) -> bool:
    """Whether :func:`score_triton` takes these."""
    return states.dtype in _DTYPES and inner_size <= 2048


def score_triton(
    states: Tensor, parameters: FoldedParameters, *, norm_eps: float, architecture: str
) -> Tensor:
    """The launches: states [N, H] to d, float32 [N]."""
    num_states, hidden_size = states.shape
    if hidden_size % ALIGNMENT or states.stride(0) % ALIGNMENT or states.stride(1) != 1:
        states = pad_columns(states).contiguous()
    p = parameters
    width = p.weight1.shape[1]
    num_outputs, inner_size = p.weight2.shape
    device, norm_eps = states.device, float(norm_eps)
    config = score_config(architecture, states.dtype, num_states)
    d = torch.empty(num_states, device=device)
    if not num_states:
        return d
    stats = torch.empty(num_states, 2, device=device)
    splits = min(config.splits, triton.cdiv(width, config.block_h))
    slices = min(config.slices, triton.cdiv(inner_size, config.tail_block_i))
    tiles = triton.cdiv(inner_size, config.block_i) * triton.cdiv(num_states, config.block_n)
    stride = states.stride(0) if num_states > 1 else 0
    if splits > 1:
        hidden = torch.empty(splits, num_states, inner_size, device=device)
        num_programs = tiles * splits + num_states
    else:
        hidden = torch.empty(num_states, inner_size, dtype=states.dtype, device=device)
        num_programs = tiles
        row_stats[(num_states,)](
            states, stats, stride, hidden_size, norm_eps, BLOCK=_STATS_BLOCK, num_warps=4
        )
    first_layer[(num_programs,)](
        states,
        p.weight1,
        p.column_sums,
        p.bias1,
        stats,
        hidden,
        num_states,
        stride,
        width,
        hidden_size,
        inner_size,
        norm_eps,
        SPLITS=splits,
        BLOCK_N=config.block_n,
        BLOCK_I=config.block_i,
        BLOCK_H=config.block_h,
        EVEN_H=width % config.block_h == 0,
        STATS_BLOCK=_STATS_BLOCK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    block_j = max(16, triton.next_power_of_2(num_outputs))
    last = p.bias2, p.weight3, p.bias3
    parts = torch.empty(slices, num_states, num_outputs, device=device) if slices > 1 else d
    other_layers[(triton.cdiv(num_states, config.tail_block_n), slices)](
        hidden,
        stats,
        p.column_sums,
        p.bias1,
        p.weight2,
        *last,
        parts,
        num_states,
        inner_size,
        num_outputs,
        SPLITS=splits,
        SLICES=slices,
        BLOCK_N=config.tail_block_n,
        BLOCK_I=config.tail_block_i,
        BLOCK_J=block_j,
        num_warps=config.tail_warps,
        num_stages=config.tail_stages,
    )
    if slices > 1:
        finish[(triton.cdiv(num_states, config.finish_block_n),)](
            parts,
            *last,
            d,
            num_states,
            num_outputs,
            SLICES=slices,
            BLOCK_N=config.finish_block_n,
            BLOCK_J=block_j,
            num_warps=4,
        )
    return d
