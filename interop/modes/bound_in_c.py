"""Applications of `torch.autograd.Function`s by an `apply` that was bound before, where torch has it in C (2.15).

They pass no Python but that which makes the node of autograd, and then look up `forward`: so that stands there which
tells of them. By then the node is there, what is within runs without gradients, and outputs have no history yet.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from ..internals.ops import SingleLevelFunction

_node: ContextVar[Any] = ContextVar("node", default=None)


def node_being_made() -> Any:
    """Autograd's node of the application that a listener hears of, if its outputs will have it only afterwards."""
    return _node.get()


@dataclass(frozen=True)
class _Arrival:
    """An application whose node is there, and whose forward has not begun."""

    cls: Any
    node: Any
    listener: Callable[..., Any]
    grad_mode: bool

    def go_on(self, forward: Callable[..., Any], given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Have it heard."""
        has_context = self.cls.setup_context is SingleLevelFunction.setup_context
        leading, args = (given[:1], given[1:]) if has_context else ((), given)

        def run(*xs: Any, **named: Any) -> Any:
            with _in_place_of_node(None), torch.no_grad():
                return forward(*leading, *xs, **named)

        with _in_place_of_node(self.node), torch.set_grad_enabled(self.grad_mode):
            return self.listener(self.cls, args, kwargs, run)


@contextlib.contextmanager
def _in_place_of_node(node: Any) -> Iterator[None]:
    token = _node.set(node)
    try:
        yield
    finally:
        _node.reset(token)


@contextlib.contextmanager
def arrivals(arriving: Callable[[Any], Callable[..., Any] | None]) -> Iterator[None]:
    """Within it, listeners hear of applications: `arriving` tells which one of that to a class, if any."""

    def made(node: Any) -> None:
        cls = node._forward_cls
        _expect(cls, None)  # one that failed before its forward
        listener = arriving(cls)
        if listener is not None:
            _expect(cls, _Arrival(cls, node, listener, torch.is_grad_enabled()))

    BackwardCFunction.__init__ = made  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del BackwardCFunction.__init__


_lock = threading.Lock()
_expected: dict[Any, dict[int, _Arrival]] = {}
"""By classes and threads."""
_MISSING = object()


def _expect(cls: Any, arrival: _Arrival | None) -> None:
    thread = threading.get_ident()
    with _lock:
        if arrival is None:
            _expected.get(cls, {}).pop(thread, None)
            return
        if cls not in _expected:
            _expected[cls] = {}
            _stand_in(cls)
        _expected[cls][thread] = arrival


def _stand_in(cls: Any) -> None:
    """Put in the place of a forward what tells of arrivals, until there are none."""
    own, forward = cls.__dict__.get("forward", _MISSING), cls.forward

    @functools.wraps(forward)
    def begins(*given: Any, **kwargs: Any) -> Any:
        with _lock:
            arrival = _expected.get(cls, {}).pop(threading.get_ident(), None)
            if _expected.get(cls) == {}:
                del _expected[cls]
                if own is _MISSING:
                    del cls.forward
                else:
                    cls.forward = own
        return forward(*given, **kwargs) if arrival is None else arrival.go_on(forward, given, kwargs)

    cls.forward = staticmethod(begins)
