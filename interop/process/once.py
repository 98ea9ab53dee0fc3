"""Making something once, also when several threads need it first at the same time."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Once(Generic[Value]):
    """`make` as a function that calls it once and then gives what it made (`functools.cache` may call it twice)."""

    def __init__(self, make: Callable[[], Value]):
        self._make, self.__doc__ = make, make.__doc__
        self.forget()

    def __call__(self) -> Value:
        if not self._made:
            with self._lock:
                if not self._made:
                    self._made = [self._make()]
        return self._made[0]

    def is_made(self) -> bool:
        """Whether somebody has needed it."""
        return bool(self._made)

    def forget(self) -> None:
        """Make it anew at the next call."""
        self._lock, self._made = threading.Lock(), list[Value]()
