"""A step: what a worker runs and times."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """`start` computes once, or begins to on a GPU; `wait` returns when a result is there; `named` gives its arrays a
    name each."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    named: Callable[[Any], Mapping[str, np.ndarray]]

    def run(self) -> Any:
        """Compute once."""
        return self.wait(self.start())


Digest = dict[str, tuple[float, float]]
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5


def digest(arrays: Mapping[str, np.ndarray]) -> Digest:
    """Of each array its norm and its product with a fixed random vector, enough to tell whether two are close."""
    return {name: _digest(array.astype(np.float64).ravel()) for name, array in arrays.items()}


def _digest(values: np.ndarray) -> tuple[float, float]:
    probe = np.random.default_rng(values.size).standard_normal(values.size)
    return float(np.linalg.norm(values)), float(values @ probe)


def difference(found: Digest, expected: Digest) -> str | None:
    """What differs by more than float32 arithmetic explains, or None.

    Gradients that are zero but for rounding are measured against the largest array.
    """
    if found.keys() != expected.keys():
        return f"other results: {sorted(found.keys() ^ expected.keys())}"
    largest = max(norm for norm, _ in expected.values())
    for name, (norm, product) in expected.items():
        tolerance = _RELATIVE * norm + _ABSOLUTE * largest
        error = max(abs(found[name][0] - norm), abs(found[name][1] - product) / 3)
        if not error <= tolerance:  # NaN is different too
            return f"{name} is off by {error:.1e} (norm {norm:.1e})"
    return None
