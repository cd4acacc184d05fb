"""A model's linear layers by :func:`mara_kernels.linear.linear`, while the engine runs it.

The layers of transformers' models look ``torch.nn.functional.linear`` up whenever they are called.
It is exchanged for the time of a forward, for the thread that runs it alone, and put back: the
model itself is not touched.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional as F

from mara_kernels.linear import has_onednn, linear

_exchange = threading.Lock()


@contextmanager
def fast_linear() -> Iterator[None]:
    """Within, this thread's linear layers run by :func:`mara_kernels.linear.linear`."""
    if not has_onednn():
        yield
        return
    with _exchange:
        mine, before = threading.get_ident(), F.linear

        def ours_here(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            call = linear if threading.get_ident() == mine else before
            return call(input, weight, bias)

        F.linear = ours_here
        try:
            yield
        finally:
            F.linear = before
