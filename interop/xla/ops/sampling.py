"""Samples of volumes at given places; those of images come as torch's parts of them."""

import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..dtypes import opmath
from ..table import op

_NEAREST, _BORDER, _REFLECTION = 1, 1, 2


@op("grid_sampler_3d")
def grid_sampler_3d(x: Any, grid: Any, interpolation: int, padding: int, align_corners: bool) -> Any:
    """Trilinear, or the nearest; beyond the volume zeros, its border, or its mirror image."""
    batch, channels, *sizes = x.shape
    dtype = opmath(x.dtype)
    volume, grid = x.astype(dtype).reshape(batch, channels, -1), grid.astype(dtype)
    places = [
        _padded(_place(grid[..., 2 - axis], size, align_corners), size, padding, align_corners)
        for axis, size in enumerate(sizes)
    ]
    if interpolation == _NEAREST:
        at = [lax.round(lax.stop_gradient(c), lax.RoundingMethod.TO_NEAREST_EVEN) for c in places]
        return _taken(volume, at, sizes)
    lower = [lax.stop_gradient(jnp.floor(c)) for c in places]
    result: Any = 0
    for corner in itertools.product((0, 1), repeat=3):
        weight: Any = 1
        for c, low, upper in zip(places, lower, corner, strict=True):
            weight = weight * (c - low if upper else low + 1 - c)
        at = [low + upper for low, upper in zip(lower, corner, strict=True)]
        result = result + _taken(volume, at, sizes) * weight[:, None]
    return result


def _place(c: Any, size: Any, align_corners: bool) -> Any:
    """What is between -1 and 1 as a position: those are the centres of the outermost voxels, or their edges."""
    return (c + 1) / 2 * (size - 1) if align_corners else ((c + 1) * size - 1) / 2


def _padded(c: Any, size: Any, padding: int, align_corners: bool) -> Any:
    if padding == _REFLECTION:
        c = _reflected(c, 0.0 if align_corners else -0.5, size - 1 if align_corners else size)
    if padding in (_BORDER, _REFLECTION):
        inside = (c > 0) & (c < size - 1)
        c = jnp.where(inside, c, lax.stop_gradient(jnp.clip(c, 0, size - 1)))
    return c


def _reflected(c: Any, low: float, span: Any) -> Any:
    """Mirrored at both ends, as often as it takes."""
    span = jnp.asarray(span, c.dtype)
    distance = jnp.where(c < low, low - c, c - low)
    safe = jnp.where(span == 0, 1, span)
    times = lax.stop_gradient(jnp.floor(distance / safe))
    rest = distance - times * safe
    return jnp.where(span == 0, 0, jnp.where(times % 2 == 0, rest, span - rest) + low)


def _taken(volume: Any, at: list[Any], sizes: list[Any]) -> Any:
    """The voxels at positions; zero where there is none."""
    inside: Any = True
    number: Any = 0
    for c, size in zip(at, sizes, strict=True):
        inside = inside & (c >= 0) & (c < size)
        number = number * size + jnp.clip(c, 0, size - 1).astype(jnp.int32)
    shape = number.shape
    found = jnp.take_along_axis(volume, number.reshape(shape[0], 1, -1), axis=2)
    return jnp.where(inside[:, None], found.reshape(*volume.shape[:2], *shape[1:]), 0)
