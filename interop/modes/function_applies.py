"""Applications of `torch.autograd.Function`s, heard by whoever asks in this context, on whichever thread.

There is one hook in torch for all who listen: hooks of their own, laid on and taken off by threads that overlap, would
stay behind.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..internals.ops import SingleLevelFunction
from ..process.switches import Switch
from . import bound_in_c

Listener = Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]
"""Given a function's class, its arguments and what applies it, returns what the application is to return."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


_heard: ContextVar[Any] = ContextVar("heard", default=None)
"""The class of the function whose application was heard, and is on its way."""


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
    """Where `Function.apply` is looked up, and where one that was bound before (`exp = Exp.apply`) arrives."""
    original: Any = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        listener = _listener.get()

        def run(*xs: Any, **named: Any) -> Any:
            token = _heard.set(cls)
            try:
                return original.__get__(None, cls)(*xs, **named)
            finally:
                _heard.reset(token)

        return run(*args, **kwargs) if listener is None else listener(cls, args, kwargs, run)

    arrivals = _in_python if isinstance(original, classmethod) else bound_in_c.arrivals
    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with arrivals(_arriving):
            yield
    finally:
        torch.autograd.Function.apply = original  # pyright: ignore[reportAttributeAccessIssue]


def _arriving(cls: Any) -> Listener | None:
    """Who is to hear of an application that is on its way to `cls`."""
    is_heard = _heard.get() is cls or not issubclass(cls, torch.autograd.Function)
    if _heard.get() is cls:
        _heard.set(None)  # what it applies itself is another one
    return None if is_heard else _listener.get()


@contextlib.contextmanager
def _in_python(arriving: Callable[[Any], Listener | None]) -> Iterator[None]:
    """Where torch has `apply` in Python: a bound one goes on to that of the base class."""

    def arrived(cls: Any, *args: Any, **kwargs: Any) -> Any:
        listener = arriving(cls)

        def run(*xs: Any, **named: Any) -> Any:
            return super(SingleLevelFunction, cls).apply(*xs, **named)  # pyright: ignore[reportAttributeAccessIssue]

        return run(*args, **kwargs) if listener is None else listener(cls, args, kwargs, run)

    SingleLevelFunction.apply = classmethod(arrived)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del SingleLevelFunction.apply  # pyright: ignore[reportAttributeAccessIssue]


_HOOK = Switch(_hook)
