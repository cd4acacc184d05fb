"""A name that models look up, exchanged while engines run them.

The layers of transformers' models look functions and methods up whenever they are called. One of
these is exchanged for another that does the same as before, except to threads in which an engine
forwards.
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
        make: of this and of what was there, what is there meanwhile. It decides by itself what
            to do. Made once: compilers guard on which it is.
    """

    def __init__(
        self, owner: Any, name: str, make: Callable[["Exchange", Callable], Callable]
    ) -> None:
        self.owner, self.name, self._make = owner, name, make
        self._lock, self._num_installed = threading.Lock(), 0
        self._before: Any = None
        self._replacement: Callable | None = None
        self._this_thread = threading.local()

    @property
    def is_within(self) -> bool:
        """This thread is, of :meth:`__call__`."""
        return getattr(self._this_thread, "depth", 0) > 0

    def install(self) -> None:
        """Puts the other there, for as many as ask."""
        with self._lock:
            if not self._num_installed:
                before = getattr(self.owner, self.name)
                if self._replacement is None or before is not self._before:
                    self._before, self._replacement = before, self._make(self, before)
                setattr(self.owner, self.name, self._replacement)
            self._num_installed += 1

    def uninstall(self) -> None:
        """Puts back what was there, when nobody needs the other any more."""
        with self._lock:
            self._num_installed -= 1
            # What somebody else has put there meanwhile stays.
            is_ours = getattr(self.owner, self.name) is self._replacement
            if not self._num_installed and is_ours:
                setattr(self.owner, self.name, self._before)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Installed within, and this thread known to be."""
        self.install()
        self._this_thread.depth = getattr(self._this_thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._this_thread.depth -= 1
            self.uninstall()
