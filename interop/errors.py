"""Errors that reach the user: each names the callable, the argument, and the remedy."""

import traceback


class TorchCallError(RuntimeError):
    """A torch callable cannot be traced, or failed while it ran.

    The message names the callable, quotes torch, and says what to do. Where torch itself
    raised, its exception is the `__cause__`.
    """


class StateError(TorchCallError):
    """The forward changes state (a buffer, an attribute) that the call could only lose."""


class RandomnessError(TorchCallError):
    """The forward draws random numbers without a source that JAX controls."""


def quote(exc: BaseException) -> str:
    """torch's own words: exception type and message."""
    return f"{type(exc).__name__}: {exc}".rstrip()


def runtime_message(name: str, exc: BaseException) -> str:
    """The text of an exception raised by torch while a compiled program ran.

    XLA carries only text across the call, so the traceback travels inside the message.
    """
    if isinstance(exc, TorchCallError):
        return str(exc)
    trace = "".join(traceback.format_exception(exc)).rstrip()
    return f"{name} raised {quote(exc)}\n\nThe torch traceback:\n{trace}"
