"""One more check of a specimen: what JAX alone makes of it, by `engine="xla"` with `strict=True`, or why not."""

import contextlib
from dataclasses import replace

import equinox as eqx
from torchleaf.layers.check.bench import Bench, wide
from torchleaf.layers.check.checks import RUNS, forward, gradients
from torchleaf.layers.check.numbers import DOUBLE, NotAskedError, WrongError, compare, numpy_of_tensors

OPTIONS = {"engine": "xla", "strict": True}


def by_xla(bench: Bench) -> float:
    """Outputs and gradients, as they are and compiled. An op that JAX does not have is a refusal that names it."""
    other = Bench(replace(bench.subject, options=OPTIONS))
    error = forward(other)
    with contextlib.suppress(NotAskedError):
        try:
            error = max(error, gradients(other))
        except WrongError:  # beside a kink, last digits decide on which side of it a number is
            error = max(error, _gradients_in_double(other))
    return error


def _gradients_in_double(bench: Bench) -> float:
    with wide(True):
        ours = bench.ours(double=True)
        compiled, errors = eqx.filter_jit(ours.gradients), []
        for number in range(RUNS):
            side = bench.torch(double=True)
            args = side.arguments(number)
            expected = numpy_of_tensors(side.gradients(args))
            actual = compiled(ours.params, *ours.arguments(number))
            errors.append(compare(actual, expected, f"in float64, run {number + 1}", DOUBLE, names=side.names(args)))
    return max(errors)
