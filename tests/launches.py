"""What would be launched on a GPU, counted by operators."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    *("alias", "detach", "expand", "flatten", "permute", "reshape", "select", "slice", "split"),
    *("squeeze", "t", "transpose", "unflatten", "unsqueeze", "view", "_unsafe_view"),
}


class Launches(TorchDispatchMode):
    """Operators that are no views, outside of what is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._within = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if not self._within and name not in _VIEWS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def hidden(self, operation: Callable, *, as_one: str = "") -> Callable:
        """The operation, of which nothing is counted; or itself, by a name."""

        def call(*args: Any, **options: Any) -> Any:
            if as_one and not self._within:
                self.found.append(as_one)
            self._within += 1
            try:
                return operation(*args, **options)
            finally:
                self._within -= 1

        return call
