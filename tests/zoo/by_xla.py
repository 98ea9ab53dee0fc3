"""One more check of a specimen: what JAX alone makes of it, by `engine="xla"` with `strict=True`, or why not."""

import contextlib
from dataclasses import replace

from torchleaf.layers.check.bench import Bench
from torchleaf.layers.check.checks import forward, gradients
from torchleaf.layers.check.numbers import NotAskedError

OPTIONS = {"engine": "xla", "strict": True}


def by_xla(bench: Bench) -> float:
    """Outputs and gradients, as they are and compiled. An op that JAX does not have is a refusal that names it."""
    other = Bench(replace(bench.subject, options=OPTIONS))
    error = forward(other)
    with contextlib.suppress(NotAskedError):
        error = max(error, gradients(other))
    return error
