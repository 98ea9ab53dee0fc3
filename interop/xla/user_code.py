"""What a user's code says to torch that no op shows: which tensors it detaches, which functions have derivatives of
their own."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..modes.function_applies import applications_heard_by
from ..modes.function_modes import FunctionMode
from .capture import Capture


@contextlib.contextmanager
def heard(capture: Capture) -> Iterator[None]:
    """Around a captured run: its capture is told."""
    with applications_heard_by(capture.apply), _Detaching(capture):
        yield


class _Detaching(FunctionMode):
    """Sees `Tensor.detach` and `.data`: torch's autograd detaches tensors too, which does not stop derivatives."""

    def __init__(self, capture: Capture):
        super().__init__()
        self._capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT and len(args) == 9 and not isinstance(args[3], list | tuple):  # not of packed sequences
            return self._capture.whole(func, _RECURRENT[func], args, kwargs or {})
        if func in _MAX_POOL and len(args) < 7 and not (kwargs or {}).get("return_indices"):
            given = {k: v for k, v in (kwargs or {}).items() if k != "return_indices"}
            return torch.nn.functional.max_pool1d_with_indices(*args, **given)[0]
        if func not in _DETACHING:
            return func(*args, **(kwargs or {}))
        self._capture.detaching += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._capture.detaching -= 1


_DETACHING = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # pyright: ignore[reportAttributeAccessIssue]


_MAX_POOL = (torch.max_pool1d, torch.nn.functional.max_pool1d)  # pyright: ignore[reportPrivateImportUsage]
"""Of which torch has a kernel for inference that wants to know sizes."""

_RECURRENT = {
    torch.lstm: "lstm.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.gru: "gru.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.rnn_tanh: "rnn_tanh.input",  # pyright: ignore[reportPrivateImportUsage]
    torch.rnn_relu: "rnn_relu.input",  # pyright: ignore[reportPrivateImportUsage]
}
"""Loops over time, which torch unrolls."""
