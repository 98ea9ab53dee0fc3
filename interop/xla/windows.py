"""Views of memory as functions of a value: what a view shows, and the value after something was put in its place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Strided:
    """Places in memory by what torch says of a view, whose sizes need not be known."""

    shape: Sequence[Any]
    strides: Sequence[Any]
    offset: Any

    def numbers(self) -> Any:
        """The places, as an array made within a program."""
        found = jnp.full(tuple(self.shape), self.offset)
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            along = [-1 if i == axis else 1 for i in range(len(self.shape))]
            found = found + (jnp.arange(size) * stride).reshape(along)
        return found


Places = np.ndarray | Strided


def window(places: Places, shape: Sequence[Any]) -> Callable[[Any], Any]:
    """The elements at `places` of a flattened array of this shape; a slice of it, where they are one."""
    if isinstance(places, Strided):
        return lambda x: x.ravel()[places.numbers()]
    slices = _slices(places, shape)
    if slices is not None:
        return lambda x: x[slices].reshape(places.shape)
    flat = places.astype(np.int32)
    return lambda x: x.ravel()[flat]


def put(places: Places, shape: Sequence[Any]) -> Callable[[Any, Any], Any]:
    """An array of this shape, with others at `places` of it, flattened."""
    if isinstance(places, Strided):
        return lambda x, part: jnp.ravel(x).at[places.numbers()].set(part).reshape(shape)
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
    if not places.size or not shape:
        return None
    found = []
    for index in np.unravel_index(places.ravel(), tuple(shape)):
        values = np.unique(index)
        step = int(values[1] - values[0]) if values.size > 1 else 1
        found.append(slice(int(values[0]), int(values[-1]) + 1, step))
    slices = tuple(found)
    shown = np.arange(int(np.prod(shape))).reshape(tuple(shape))[slices]
    return slices if shown.size == places.size and (shown.ravel() == places.ravel()).all() else None
