"""Layers, by Triton on a GPU and by torch elsewhere."""

from typing import Any

from torch import Tensor

from mara_kernels import dispatch
from mara_kernels.arguments import check_tensor
from mara_kernels.layers import reference
from mara_kernels.layers.reference import NormRule


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, rule: NormRule) -> Tensor:
    """Root mean square norm: x / sqrt(mean(x^2) + eps) in float32, times a factor.

    The Triton body takes up to 16384 columns of bf16, fp16 or float32, the weight in the same
    dtype; the rest, and what needs a gradient, is done by the torch body.

    Args:
        x: [..., H]
        weight: [H]
        eps: keeps the root from zero.
        rule: how the factor is made and where rounding happens.

    Returns:
        [..., H], in the dtype of ``x``.

    Raises:
        ValueError: the weight has another shape.
    """
    check_tensor("weight", weight, x.shape[-1:])
    body: Any = reference
    if dispatch.choose("layers", x.device).name == "triton":
        from mara_kernels.layers import kernel

        if kernel.covers_norm(x, weight) and not dispatch.needs_gradient(x, weight) and x.numel():
            body = kernel
    with dispatch.on_device(x):
        return body.rms_norm(x, weight, eps=eps, rule=rule)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: each half of a head turned against the other.

    The Triton body takes even head sizes up to 512, all tensors in one dtype, bf16, fp16 or
    float32, and angles of every position; the rest is done by the torch body.

    Args:
        query: [B, Hq, T, D]
        key: [B, Hkv, T, D]
        cos: [B, T, D] or [1, T, D]
        sin: as ``cos``.

    Returns:
        Both, rotated.
    """
    body: Any = reference
    if dispatch.choose("layers", query.device).name == "triton":
        from mara_kernels.layers import kernel

        is_covered = kernel.covers_rotation(query, key, cos, sin) and query.numel()
        if is_covered and not dispatch.needs_gradient(query, key, cos, sin):
            body = kernel
    with dispatch.on_device(query):
        return body.rotate(query, key, cos, sin)
