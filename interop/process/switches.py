"""Global switches of torch's that several threads hold at once."""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Switch:
    """Off with the first that holds it, on again after the last, be it in another thread."""

    def __init__(self, enter: Callable[[], contextlib.AbstractContextManager[Any]]):
        self._enter, self._lock = enter, threading.Lock()
        self._users, self._exit = 0, contextlib.ExitStack()
        self._context = contextvars.Context()  # of both: a context variable is set back only where it was set

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for a while."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Hold it from now on."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._context.run(lambda: self._exit.enter_context(self._enter()))

    def release(self) -> None:
        """Let go of it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.run(self._exit.close)


def flag_off(is_on: Callable[[], bool], turn: Callable[[bool], None]) -> Switch:
    """The switch of a flag, by what reads and what sets it."""

    @contextlib.contextmanager
    def off() -> Iterator[None]:
        before = is_on()
        turn(False)
        try:
            yield
        finally:
            turn(before)

    return Switch(off)
