"""A model's linear layers by :func:`mara_kernels.linear.linear`, while the engine runs it.

The layers of transformers' models look ``torch.nn.functional.linear`` up whenever they are called.
It is exchanged while an engine forwards on a CPU, to another effect for the threads that do alone,
and put back: the model itself is not touched.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from mara_kernels.linear import has_onednn, linear

_lock = threading.Lock()
_num_within = 0
_before = F.linear


class _ThisThread(threading.local):
    depth = 0
    """Of :func:`fast_linear`."""


_this_thread = _ThisThread()


# One function for all: compilers guard on which it is, and compile anew for another.
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not torch.compiler.is_compiling() and _this_thread.depth:
        return linear(input, weight, bias)
    return _before(input, weight, bias)


@contextmanager
def fast_linear() -> Iterator[None]:
    """Within, this thread's linear layers run by :func:`mara_kernels.linear.linear`."""
    global _before, _num_within
    if not has_onednn():
        yield
        return
    with _lock:
        if not _num_within:
            _before, F.linear = F.linear, _linear
        _num_within += 1
    _this_thread.depth += 1
    try:
        yield
    finally:
        _this_thread.depth -= 1
        with _lock:
            _num_within -= 1
            if not _num_within:
                F.linear = _before
