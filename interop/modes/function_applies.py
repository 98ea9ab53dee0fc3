"""Applications of `torch.autograd.Function`s, heard by whoever asks in this context, on whichever thread.

There is one hook in torch for all who listen: hooks of their own, laid on and taken off by threads that overlap, would
stay behind.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..process.switches import Switch

Listener = Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]
"""Given a function's class, its arguments and what applies it, returns what the application is to return."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def applications_heard_by(listener: Listener) -> Iterator[None]:
    """Within it the listener stands for `Function.apply`; what it applies goes by the listener around it, if any."""
    outer = _listener.get()
    token = _listener.set(listener if outer is None else _within(outer, listener))
    try:
        with _HOOK.held():
            yield
    finally:
        _listener.reset(token)


def _within(outer: Listener, listener: Listener) -> Listener:
    def both(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        return listener(cls, args, kwargs, lambda *xs, **named: outer(cls, xs, named, run))

    return both


@contextlib.contextmanager
def _hook() -> Iterator[None]:
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        listener, run = _listener.get(), original.__get__(None, cls)
        return run(*args, **kwargs) if listener is None else listener(cls, args, kwargs, run)

    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


_HOOK = Switch(_hook)
