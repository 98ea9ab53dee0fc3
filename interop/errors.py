"""Errors that reach the user: each names the callable, the argument, and the remedy."""

import traceback
from collections.abc import Iterable, Sequence
from typing import Any


class TorchCallError(RuntimeError):
    """A torch callable cannot be traced, or failed while it ran.

    The message names the callable, quotes torch, and says what to do. Where torch itself
    raised, its exception is the `__cause__`.
    """


class StateError(TorchCallError):
    """The forward changes state (a buffer, an attribute) that the call could only lose or mix up."""


class CapturedWriteError(StateError):
    """The callable writes into a tensor that is neither an argument nor made by it."""

    def __init__(self, message: str, tensor: Any):
        super().__init__(message)
        self.tensor = tensor


class ForeignTensorError(TorchCallError):
    """The callable computes with a tensor that its operands stand for, and that it must not reach."""

    def __init__(self, name: str, tensor: Any, what: str):
        super().__init__(f"{name} computes with `{what}` as it was when the callable was made, not as it is given.")
        self.tensor, self.what = tensor, what


class RandomnessError(TorchCallError):
    """The forward draws random numbers, but was given no key to draw them from."""


def quote(exc: BaseException) -> str:
    """torch's own words: exception type and message."""
    return f"{type(exc).__name__}: {exc}".rstrip()


def signature_text(names: Sequence[str], operands: Iterable[tuple[Sequence[int], Any]]) -> str:
    """Operands as names, dtypes and shapes: `(x: float32[5, 3], weight: float32[4, 3])`."""
    given = [f"{n}: {str(d).removeprefix('torch.')}{list(s)}" for n, (s, d) in zip(names, operands, strict=True)]
    shown = given if len(given) <= 8 else [*given[:4], f"... {len(given) - 8} more ...", *given[-4:]]
    return "(" + ", ".join(shown) + ")"


def runtime_message(name: str, signature: str, exc: BaseException) -> str:
    """The text of an exception raised by torch while a compiled program ran.

    XLA carries only text across the call, so the traceback travels inside the message.
    """
    if isinstance(exc, TorchCallError):
        return str(exc)
    trace = "".join(traceback.format_exception(exc)).rstrip()
    return f"{name} raised {quote(exc)}\nIt was called with {signature}.\n\nThe torch traceback:\n{trace}"
