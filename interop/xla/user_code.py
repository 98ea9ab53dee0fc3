"""What a user's code says to torch that no op shows: which tensors it detaches, which functions have derivatives of
their own."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..modes.function_modes import FunctionMode
from ..process.switches import Switch
from .capture import Capture

_capture: ContextVar[Capture | None] = ContextVar("capture", default=None)


@contextlib.contextmanager
def heard(capture: Capture) -> Iterator[None]:
    """Around a captured run: its capture is told."""
    token = _capture.set(capture)
    try:
        with _APPLYING.held(), _Detaching(capture):
            yield
    finally:
        _capture.reset(token)


class _Detaching(FunctionMode):
    """Sees `Tensor.detach` and `.data`: torch's autograd detaches tensors too, which does not stop derivatives."""

    def __init__(self, capture: Capture):
        super().__init__()
        self._capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT and len(args) == 9 and not isinstance(args[3], list | tuple):  # not of packed sequences
            return self._capture.whole(func, _RECURRENT[func], args, kwargs or {})
        if func not in _DETACHING:
            return func(*args, **(kwargs or {}))
        self._capture.detaching += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._capture.detaching -= 1


_DETACHING = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # pyright: ignore[reportAttributeAccessIssue]


_RECURRENT = {
    torch.lstm: "lstm.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.gru: "gru.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.rnn_tanh: "rnn_tanh.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.rnn_relu: "rnn_relu.input",  # pyright: ignore[reportPrivateImportUsage]
}
"""Loops over time, which torch unrolls."""


@contextlib.contextmanager
def _applying() -> Iterator[None]:
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        capture, run = _capture.get(), original.__get__(None, cls)
        return run(*args, **kwargs) if capture is None else capture.apply(cls, args, kwargs, run)

    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


_APPLYING = Switch(_applying)
