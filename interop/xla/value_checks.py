"""Errors that a callable raises by values: `if (var < 0).any(): raise ValueError(...)`.

One program serves for all values, so it takes the way on which no error is raised, and tells whether that was right.
Which way that is, runs on fake tensors show: where code asks for a bool that follows from operands, one answer makes it
raise an exception, the other does not. A bool by which it goes one way or another is refused as before.

Where a check fails, the program raises torch's error or, if it cannot (`failing.py`), its results are NaN, and so are
their derivatives.
"""

import dis
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import TorchCallError, quote
from ..tracing.trace import Fake
from .failing import one_unless
from .graph import Check
from .lines import line_of


@dataclass(frozen=True)
class Assumptions:
    """What a callable is told of values that it reads."""

    answers: list[Any] = field(default_factory=list)
    """All that it reads, in order; of what is known beforehand, what it is."""
    errors: dict[int, str] = field(default_factory=dict)
    """What it raises for another answer than that of this position."""


def assumptions(run: Callable[[Sequence[Any]], Fake]) -> Assumptions:
    """The answers by which a callable raises no error, as far as it only checks by them.

    **Arguments:**

    - `run`: runs it on fake tensors with answers.
    """
    answers, errors = [], {}
    outcome = _outcome(run, answers)
    while outcome is not None and _asks(outcome):
        reads = outcome[1].reads
        either = {answer: _outcome(run, [*reads, answer]) for answer in (True, False)}
        raised = {answer: one[2] for answer, one in either.items() if one is not None and _raises(one)}
        if len(raised) != 1:
            break
        [(answer, error)] = raised.items()
        answers, errors[len(reads)] = [*reads, not answer], _words(error)
        outcome = either[not answer]
    return Assumptions(answers, errors)


def _outcome(run: Callable[[Sequence[Any]], Fake], answers: Sequence[Any]) -> Fake | None:
    """What a run shows; None if torchleaf refuses it."""
    try:
        return run(answers)
    except TorchCallError:
        return None


def _asks(outcome: Fake) -> bool:
    """Whether a run ended where it wanted a bool."""
    found, mode, _ = outcome
    return found is None and mode.failure is not None and mode.failure.reads_values and mode.failure.is_question


def _raises(outcome: Fake) -> bool:
    """Whether Python code raised an exception, and not an op, which fake tensors may make fail."""
    _, mode, exc = outcome
    if exc is None or mode.failure is not None:
        return False
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _words(exc: Exception | None) -> str:
    assert exc is not None
    words, where = quote(exc).replace("FakeTensor", "Tensor"), line_of(exc)
    return f"{words}{f' (in {where})' if where else ''}"


# --- ops that ask --------------------------------------------------------------------------------


def statement(op_name: str) -> Callable[..., Any] | None:
    """The function of JAX arrays that gives the bool which an op gives to Python; None if it gives none."""
    return _STATEMENTS.get(op_name.partition(".")[0])


def _truth(x: Any, *message: str) -> Any:
    return jnp.reshape(x, ()) != 0


def _equal(x: Any, y: Any) -> Any:
    return jnp.asarray(x.shape == y.shape and jnp.all(x == y))


def _allclose(x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
    return jnp.allclose(x, y, rtol, atol, equal_nan)


_STATEMENTS = {
    **dict.fromkeys(("_local_scalar_dense", "is_nonzero", "_assert_async"), _truth),
    "equal": _equal,
    "allclose": _allclose,
}


# --- in programs ---------------------------------------------------------------------------------


def enforced(
    name: str, checks: Sequence[Check], values: Mapping[int, Any], results: Sequence[Any], *, raises: bool
) -> list[Any]:
    """The results, which are there only if all checks pass.

    **Arguments:**

    - `name`: the callable's.
    - `checks`: what it checks.
    - `values`: those of the graph.
    - `results`: its results.
    - `raises`: whether a check that fails raises an error where it can.
    """
    one, shows = jnp.ones((), jnp.float32), any(jnp.issubdtype(x.dtype, jnp.inexact) for x in results)
    for check in checks:
        fails = jax.lax.stop_gradient(values[check.value]) != check.passes
        one = one * one_unless(fails, f"{name} raised {check.error}", raises=raises, shows=shows)
    return [_times(x, one) for x in results] if checks else list(results)


def _times(x: Any, one: Any) -> Any:
    """A value by one or NaN, and so its derivative: a program of derivatives alone has the checks, too."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jax.lax.complex(_times(x.real, one), _times(x.imag, one))
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x * one.astype(x.dtype)
    largest = True if x.dtype == jnp.bool_ else jnp.iinfo(x.dtype).max
    return jnp.where(jnp.isnan(one), jnp.asarray(largest, x.dtype), x)
