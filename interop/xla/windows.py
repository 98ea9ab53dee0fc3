"""Views of memory as functions of a value: what a view shows, and the value after something was put in its place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def window(places: np.ndarray, shape: Sequence[int]) -> Callable[[Any], Any]:
    """The elements at `places` of a flattened array of this shape; a slice of it, where they are one."""
    slices = _slices(places, shape)
    if slices is not None:
        return lambda x: x[slices].reshape(places.shape)
    flat = places.astype(np.int32)
    return lambda x: x.ravel()[flat]


def put(places: np.ndarray, shape: Sequence[int]) -> Callable[[Any, Any], Any]:
    """An array of this shape, with others at `places` of it, flattened."""
    slices = _slices(places, shape)
    if slices is not None:
        sizes = tuple(len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True))
        if sizes == tuple(shape):
            return lambda x, part: part.reshape(shape)
        return lambda x, part: x.at[slices].set(part.reshape(sizes))
    flat = places.ravel().astype(np.int32)
    return lambda x, part: jnp.ravel(x).at[flat].set(part.ravel()).reshape(shape)


def _slices(places: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...] | None:
    """Slices of all axes that give these places, in this order."""
    if not places.size:
        return None
    found = []
    for index in np.unravel_index(places.ravel(), tuple(shape)):
        values = np.unique(index)
        step = int(values[1] - values[0]) if values.size > 1 else 1
        found.append(slice(int(values[0]), int(values[-1]) + 1, step))
    slices = tuple(found)
    shown = np.arange(int(np.prod(shape))).reshape(tuple(shape))[slices]
    return slices if shown.size == places.size and (shown.ravel() == places.ravel()).all() else None
