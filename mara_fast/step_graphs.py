"""The decode step as CUDA graphs: captured once per number of slots, replayed without Python.

    bucket = the next power of two >= the slots that decode     (idle slots change nothing)
    first step of a bucket   runs eagerly, which also loads and compiles what it needs
    second                   is captured, then replayed
    later ones               are replayed

All graphs share one memory pool, as only one runs at a time. A step that cannot be captured (a
model that reads tensors on the host, say) is run eagerly from then on, and a warning says why.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Makes what a call does, without doing it, into something that can be replayed."""

_logger = logging.getLogger(__name__)


class CudaCapture:
    """Captures CUDA graphs; those that live at the same time share a pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, call: Callable[[], None]) -> Replay:
        """The call as a graph."""
        graph = torch.cuda.CUDAGraph()
        if not self._alive:
            # torch refuses a pool all of whose graphs are gone while anything in it is not: the
            # workspace of cuBLAS is not.
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            call()
        self._alive.add(graph)
        return graph.replay


class StepGraphs:
    """Runs steps by replaying graphs of them.

    Args:
        step: takes the number of slots; device-only, writes to tensors that stay where they are.
        capture: how a step becomes a graph.
    """

    def __init__(self, step: Callable[[int], None], *, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._seen: set[int] = set()
        self._graphs: dict[int, Replay] = {}
        self.failure: str | None = None
        """Why steps run eagerly; None: they do not."""

    def step(self, num_decoding: int, *, most: int) -> None:
        """A step of ``num_decoding`` to ``most`` slots; those between the two are idle."""
        bucket = min(most, 1 << (num_decoding - 1).bit_length())
        if self.failure is None and bucket in self._seen and bucket not in self._graphs:
            try:
                self._graphs[bucket] = self._capture(lambda: self._step(bucket))
            except RuntimeError as error:
                self.failure = str(error).strip().partition("\n")[0] or type(error).__name__
                self._graphs.clear()
                _logger.warning(
                    "the decode step runs without a CUDA graph, it cannot be captured: %s",
                    self.failure,
                )
        if bucket in self._graphs:
            self._graphs[bucket]()
            return
        self._seen.add(bucket)
        self._step(bucket if self.failure is None else num_decoding)

    def forget(self) -> None:
        """Drops the graphs: tensors that they read or write have moved."""
        self._graphs.clear()
        self._seen.clear()
