"""A model's linear layers by :func:`mara_kernels.linear.linear`, while the engine runs it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_fast.exchange import Exchange
from mara_kernels.linear import has_onednn, linear


def _make(exchange: Exchange, before: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fast(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling() and exchange.is_within:
            return linear(input, weight, bias)
        return before(input, weight, bias)

    return fast


_exchange = Exchange(F, "linear", _make)


def fast_linear() -> AbstractContextManager[None]:
    """Within, this thread's linear layers run by :func:`mara_kernels.linear.linear`."""
    return _exchange() if has_onednn() else nullcontext()
