"""A name that models look up, exchanged while an engine runs one of them.

The layers of transformers' models look functions and methods up whenever they are called. One of
these is exchanged while an engine forwards, to another effect for the threads that do alone, and
put back: the model itself is not touched.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Exchange:
    """Exchanges ``owner.name``.

    Args:
        owner: module or class.
        name: its attribute.
        make: of what was there, what is there meanwhile. It asks :attr:`is_within` whether this
            thread is, and does what was there if not. Made once: compilers guard on which it is.
    """

    def __init__(
        self, owner: Any, name: str, make: Callable[["Exchange", Callable], Callable]
    ) -> None:
        self.owner, self.name, self._make = owner, name, make
        self._lock, self._num_within = threading.Lock(), 0
        self._before: Any = None
        self._replacement: Callable | None = None
        self._this_thread = threading.local()

    @property
    def is_within(self) -> bool:
        """This thread is."""
        return getattr(self._this_thread, "depth", 0) > 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the name means something else to this thread."""
        with self._lock:
            if not self._num_within:
                before = getattr(self.owner, self.name)
                if self._replacement is None or before is not self._before:
                    self._before, self._replacement = before, self._make(self, before)
                setattr(self.owner, self.name, self._replacement)
            self._num_within += 1
        self._this_thread.depth = getattr(self._this_thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._this_thread.depth -= 1
            with self._lock:
                self._num_within -= 1
                # What somebody else has put there meanwhile stays.
                is_ours = getattr(self.owner, self.name) is self._replacement
                if not self._num_within and is_ours:
                    setattr(self.owner, self.name, self._before)
