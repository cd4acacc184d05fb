"""CUDA graphs, played on a CPU: a call's operators are recorded, and repeated on the same tensors.

As with a graph, capturing does nothing, no Python runs when it is replayed, every operator reads
and writes the memory it had when it was captured, and reading a tensor on the host is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from host_reads import ForbidHostReads


class Tape(TorchDispatchMode):
    """Records operators; exiting undoes what they did to tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self._operators: list[tuple[Any, tuple, dict, list[Any]]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in ForbidHostReads.FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        inputs = {
            _storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        outputs = func(*args, **kwargs)
        # Whether reshape and its like copy depends on the strides, so the schema does not say.
        fresh = [out for out in tree_leaves(outputs) if isinstance(out, Tensor)]
        fresh = [out if _storage(out) not in inputs else None for out in fresh]
        self._own.update(_storage(out) for out in fresh if out is not None)
        self._operators.append((func, args, kwargs, fresh))
        return outputs

    def _keep(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key not in self._own and key not in self._before:
            self._before[key] = (storage, storage.clone())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        """Repeats every operator on the tensors it had."""
        for func, args, kwargs, recorded in self._operators:
            outputs = func(*args, **kwargs)
            found = [out for out in tree_leaves(outputs) if isinstance(out, Tensor)]
            for into, out in zip(recorded, found, strict=True):
                if into is not None:
                    into.copy_(out)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TapeCapture:
    """A stand-in for :class:`mara_fast.step_graphs.CudaCapture`; counts what it did."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """The call as a tape."""
        self.num_captured += 1
        with Tape() as tape:
            call()

        def replay() -> None:
            self.num_replayed += 1
            tape.replay()

        return replay
