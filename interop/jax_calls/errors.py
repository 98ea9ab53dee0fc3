"""The error of a JAX function that torch has called."""

from collections.abc import Iterable
from typing import Any

from ..errors import quote


class JaxCallError(RuntimeError):
    """A JAX function that torch called cannot be traced, or failed while it ran.

    The message names the function and its operands, and quotes JAX; JAX's exception is the `__cause__`.
    """


def operands_text(avals: Iterable[Any]) -> str:
    """Operands as JAX writes them: `(float32[5,3], int32[])`."""
    given = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in avals]
    shown = given if len(given) <= 8 else [*given[:4], f"... {len(given) - 8} more ...", *given[-4:]]
    return "(" + ", ".join(shown) + ")"


def failure(name: str, avals: Iterable[Any], exc: BaseException) -> JaxCallError:
    """What is raised in the place of JAX's exception."""
    return JaxCallError(f"{name} raised {quote(exc)}\nIt was called with {operands_text(avals)}.")
