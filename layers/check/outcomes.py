"""All checks by name, and what each gives: an outcome, whatever it raises."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping

import jax

from ...interop.errors import TorchCallError
from .bench import Bench, first_line
from .checks import batches, forward, forward_mode, gradients, gradients_of_examples, state
from .higher import finite_differences, keys, second_derivatives
from .numbers import NotAskedError, WrongError
from .remarks import remarks
from .report import Outcome

Check = Callable[[Bench], float]

CHECKS: dict[str, Check] = {
    "forward": forward,
    "gradients": gradients,
    "finite differences": finite_differences,
    "forward mode": forward_mode,
    "vmap": batches,
    "vmap of gradients": gradients_of_examples,
    "Hessian-vector products": second_derivatives,
    "state": state,
    "keys": keys,
}

_LINES, _CHARACTERS = 6, 900
"""How much of an error is shown: what is said, torch's words and the remedy, without a traceback."""


def outcomes_of(bench: Bench, checks: Mapping[str, Check] = CHECKS) -> Iterable[Outcome]:
    """Carry out checks, one after another."""
    return (outcome_of(name, check, bench) for name, check in checks.items())


def outcome_of(name: str, check: Check, bench: Bench) -> Outcome:
    """Carry out a check."""
    reason = bench.subject.not_asked.get(name) or (bench.subject.cannot_compare if name != "keys" else None)
    if reason is not None:
        return Outcome(name, "n/a", reason)
    started = time.monotonic()
    bench.made.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # packages have many; the library's own are remarks
        try:
            error = check(bench)
        except Exception as exc:
            return _failed(name, exc, time.monotonic() - started)
    text = "\n".join(remarks(bench.made, caught))
    bench.made.clear()
    return Outcome(name, "slow" if text else "ok", text, error, time.monotonic() - started)


def _failed(name: str, exc: Exception, seconds: float) -> Outcome:
    """The outcome of a check that raised."""
    if isinstance(exc, NotAskedError):
        return Outcome(name, "n/a", str(exc), seconds=seconds)
    if isinstance(exc, WrongError):
        return Outcome(name, "wrong", str(exc), seconds=seconds)
    if isinstance(exc, TorchCallError) or _is_refusal(exc):
        return Outcome(name, "refused", _shown(exc), seconds=seconds)
    return Outcome(name, "error", first_line(exc), seconds=seconds)


def _is_refusal(exc: Exception) -> bool:
    """Whether a running program was refused: XLA carries the text of a `TorchCallError` across, without traceback."""
    return isinstance(exc, jax.errors.JaxRuntimeError) and "The torch traceback:" not in str(exc)


def _shown(exc: Exception) -> str:
    """What an error says, and the remedy."""
    text = "\n".join(f"{type(exc).__name__}: {exc}".split("\n\n")[0].splitlines()[:_LINES])
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " ..."
