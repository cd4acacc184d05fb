"""Layers in Triton: the definitions of :mod:`reference`, a launch each, with the same roundings.

Shapes: N rows, H hidden; B sequences, T positions, Hq query heads, Hkv key heads, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mara_kernels.layers.reference import NormRule

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HIDDEN_SIZE = 16384
_MAX_HEAD_SIZE = 512
_TILE = 1024
"""Elements of heads, or of a row for each of its warps, at a time."""


@triton.jit
def normalizing(
    x_ptr,  # [N, H]
    weight_ptr,  # [H]
    output_ptr,  # [N, H]
    hidden_size,
    eps,
    ADDS_ONE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    is_in = h < hidden_size
    x = tl.load(x_ptr + row * hidden_size + h, mask=is_in, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / hidden_size
    normed = x * tl.rsqrt(mean_square + eps)
    factor = tl.load(weight_ptr + h, mask=is_in, other=0.0).to(tl.float32)
    dtype = output_ptr.dtype.element_ty
    if ADDS_ONE:
        factor += 1.0
        if ROUNDS_FIRST:
            factor = factor.to(dtype).to(tl.float32)
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(output_ptr + row * hidden_size + h, (normed * factor).to(dtype), mask=is_in)


@triton.jit
def _turn(x_ptr, output_ptr, stride_h, head, num_heads, d, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Rotates some heads of a position."""
    dtype = output_ptr.dtype.element_ty
    is_in = (head < num_heads)[:, None] & (d < HALF)[None, :]
    at = head[:, None].to(tl.int64) * stride_h + d[None, :]
    low = tl.load(x_ptr + at, mask=is_in, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + at + HALF, mask=is_in, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    # In half precision every product is rounded before the sum.
    first = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    second = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    at = head[:, None] * (2 * HALF) + d[None, :]
    tl.store(output_ptr + at, first.to(dtype), mask=is_in)
    tl.store(output_ptr + at + HALF, second.to(dtype), mask=is_in)


@triton.jit(do_not_specialize=["num_rows"])
def rotating(
    query_ptr,  # [B, Hq, T, D]
    key_ptr,  # [B, Hkv, T, D]
    cos_ptr,  # [B, T, D]
    sin_ptr,  # [B, T, D]
    query_output_ptr,  # [B, T, Hq, D]
    key_output_ptr,  # [B, T, Hkv, D]
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    angle_stride_b,
    num_rows,
    num_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    sequence, position = place // num_rows, place % num_rows
    angle = sequence * angle_stride_b + position * (2 * HALF)
    cos_ptr += angle
    sin_ptr += angle
    d = tl.arange(0, BLOCK_D)
    tile, tiles = tl.program_id(1), tl.cdiv(num_heads, BLOCK_H)
    if tile < tiles:
        _turn(
            query_ptr + sequence * query_stride_b + position * query_stride_t,
            query_output_ptr + place * num_heads * (2 * HALF),
            query_stride_h,
            tile * BLOCK_H + tl.arange(0, BLOCK_H),
            num_heads,
            d,
            cos_ptr,
            sin_ptr,
            HALF,
        )
    else:
        _turn(
            key_ptr + sequence * key_stride_b + position * key_stride_t,
            key_output_ptr + place * num_kv_heads * (2 * HALF),
            key_stride_h,
            (tile - tiles) * BLOCK_H + tl.arange(0, BLOCK_H),
            num_kv_heads,
            d,
            cos_ptr,
            sin_ptr,
            HALF,
        )


def covers_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`rms_norm` takes these."""
    return x.dtype == weight.dtype and x.dtype in _DTYPES and x.shape[-1] <= _MAX_HIDDEN_SIZE


def covers_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether :func:`rotate` takes these."""
    num_slots, _, num_rows, head_size = query.shape
    return (
        query.dtype == key.dtype == cos.dtype == sin.dtype
        and query.dtype in _DTYPES
        and head_size % 2 == 0
        and head_size <= _MAX_HEAD_SIZE
        and key.shape == (num_slots, key.shape[1], num_rows, head_size)
        and cos.shape == sin.shape
        and cos.shape[0] in (1, num_slots)
        and cos.shape[1:] == (num_rows, head_size)
        and query.stride(-1) == key.stride(-1) == 1
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rule: NormRule) -> Tensor:
    """The launch; arguments as those of the operation."""
    x = x.contiguous()
    hidden_size = x.shape[-1]
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(max(2, hidden_size))
    normalizing[(x.numel() // hidden_size,)](
        x,
        weight.contiguous(),
        output,
        hidden_size,
        float(eps),
        ADDS_ONE=rule.adds_one,
        ROUNDS_FIRST=rule.rounds_first,
        BLOCK=block,
        num_warps=min(16, max(1, block // _TILE)),
    )
    return output


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The launch; arguments as those of the operation. As the projections leave them, heads are
    the inner axis of the results' memory."""
    num_slots, num_heads, num_rows, head_size = query.shape
    num_kv_heads = key.shape[1]

    def empty(heads: int) -> Tensor:
        size = num_slots, num_rows, heads, head_size
        return torch.empty(size, dtype=query.dtype, device=query.device)

    outputs = empty(num_heads), empty(num_kv_heads)
    cos, sin = cos.contiguous(), sin.contiguous()
    block_d = triton.next_power_of_2(max(2, head_size // 2))
    block_h = min(triton.next_power_of_2(num_heads), max(1, _TILE // block_d))
    tiles = triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h)
    rotating[(num_slots * num_rows, tiles)](
        query,
        key,
        cos,
        sin,
        *outputs,
        *query.stride()[:3],
        *key.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        num_rows,
        num_heads,
        num_kv_heads,
        HALF=head_size // 2,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return outputs[0].transpose(1, 2), outputs[1].transpose(1, 2)
