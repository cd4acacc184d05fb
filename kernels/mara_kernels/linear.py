"""x W^T + b on a CPU: by oneDNN where MKL, which torch asks, is slow.

Few rows against a large float32 matrix are most of what decoding computes. MKL reads such a matrix
with one thread where there is a single row, and packs it anew for every product of more: measured
on an AMD EPYC of two cores, 512 inputs and 32000 outputs, oneDNN takes 2.4 instead of 6.3 ms for
one row, 3.5 instead of 20 for three, and 5.5 instead of 11.7 for sixteen. Of more than a row its
sums are less exact, 4e-7 to 6e-7 of their size instead of 2e-7 to 3e-7 (512 to 4096 inputs).
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEAST_WEIGHTS = 2**18
"""Below, what a call costs decides, and oneDNN's costs more."""

_PLAIN = (Tensor, nn.Parameter)
"""Subclasses of these have a linear of their own."""

_torch_linear = F.linear


@cache
def has_onednn() -> bool:
    """There is oneDNN, and MKL to be replaced by it."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, equal to it but for rounding. What needs a gradient, is
    under autocast, small, or of another dtype, device or layout is torch's.

    Args:
        input: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N], in the dtype of the input.
    """
    if (
        # A compiler makes its own choice, and traces none of these questions.
        not torch.compiler.is_compiling()
        and has_onednn()
        and type(weight) in _PLAIN
        and type(input) in _PLAIN
        and weight.dtype == input.dtype == torch.float32
        and weight.device.type == input.device.type == "cpu"
        and weight.numel() >= _LEAST_WEIGHTS
        and weight.ndim == 2
        and input.shape[-1] == weight.shape[1]
        and input.numel()
        and weight.is_contiguous()
        and (bias is None or _fits(bias, weight))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    ):
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return _torch_linear(input, weight, bias)


def _fits(bias: Tensor, weight: Tensor) -> bool:
    return (
        type(bias) in _PLAIN
        and bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
        and bias.device == weight.device
        and bias.is_contiguous()
    )
