"""Programs of JAX that are called from within others: each depth has threads of XLA's of its own.

A torch call holds the thread of XLA's that runs it. Where it calls JAX, and as many others do so at the same time as
XLA has threads, none would be left for what they call, and they would wait for ever. So what a torch call calls runs
on the threads of another client of XLA's.
"""

import atexit
import threading
from collections.abc import Callable, Sequence
from typing import Any


class _Here(threading.local):
    depth = 0


_here = _Here()


def depth_here() -> int:
    """How many programs, each called by the one before, wait for what this thread does: 0 outside of torch calls."""
    return _here.depth


def run_at(depth: int, work: Callable[..., Any], *args: Any) -> Any:
    """What `work(*args)` returns, run in this thread at a depth."""
    before, _here.depth = _here.depth, depth
    try:
        return work(*args)
    finally:
        _here.depth = before


class Devices:
    """A device for each depth, made when it is first asked for.

    **Arguments:**

    - `first`: gives that of the user's programs.
    - `another`: makes one with threads of its own.
    """

    def __init__(self, first: Callable[[], Any], another: Callable[[], Any]):
        self._first, self._another = first, another
        self._made: list[Any] = []
        self._lock = threading.Lock()
        atexit.register(self._made.clear)

    def at(self, depth: int) -> Any:
        """The device at a depth."""
        if len(self._made) <= depth:
            with self._lock:
                while len(self._made) <= depth:
                    self._made.append(self._another() if self._made else self._first())
        return self._made[depth]

    def are_used(self) -> bool:
        """Whether somebody has asked for one."""
        return bool(self._made)

    def depth_of(self, devices: Sequence[Any]) -> int:
        """The depth of programs that are compiled for some devices."""
        return next((i for i, made in enumerate(self._made) if devices and made is devices[0]), 0)
