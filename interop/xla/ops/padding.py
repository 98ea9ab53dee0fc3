"""Padding, and patches of images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..dtypes import Number
from ..table import op


@op("constant_pad_nd")
def constant_pad(x: Any, pad: Sequence[int], value: Number = 0) -> Any:
    """More positions on each side of the last axes, or fewer."""
    widths = [(0, 0, 0)] * (x.ndim - len(pad) // 2)
    widths += [(pad[i], pad[i + 1], 0) for i in range(len(pad) - 2, -1, -2)]
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)


def _padded(x: Any, pad: Sequence[int], nearest: Callable[[np.ndarray, int], np.ndarray]) -> Any:
    """With the last axes padded, or cut, by positions that are found in the axis."""
    for i in range(len(pad) // 2):
        axis = x.ndim - 1 - i
        size = x.shape[axis]
        x = jnp.take(x, nearest(np.arange(-pad[2 * i], size + pad[2 * i + 1]), size), axis=axis)
    return x


def _reflected(places: np.ndarray, size: int) -> np.ndarray:
    places = np.abs(places)
    return np.where(places >= size, 2 * (size - 1) - places, places)


def _clipped(places: np.ndarray, size: int) -> np.ndarray:
    return places.clip(0, size - 1)


@op("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def reflection_pad(x: Any, pad: Sequence[int]) -> Any:
    """Padded by reflections."""
    return _padded(x, pad, _reflected)


@op("replication_pad1d", "replication_pad2d", "replication_pad3d")
def replication_pad(x: Any, pad: Sequence[int]) -> Any:
    """Padded by the values on the border."""
    return _padded(x, pad, _clipped)


@op("im2col")
def im2col(x: Any, kernel: Sequence[int], dilation: Any, padding: Any, stride: Any, *, out: Any) -> Any:
    """Patches of images, as columns."""
    flat = x if x.ndim == 4 else x[None]
    return _patches(flat, kernel, dilation, padding, stride).reshape(out.shape)


def _patches(x: Any, kernel: Sequence[int], dilation: Any, padding: Any, stride: Any) -> Any:
    x = jnp.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    rows, columns = (
        np.arange(0, n - d * (k - 1), s)[None] + d * np.arange(k)[:, None]
        for n, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)
    )
    taken = x[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    return taken.reshape(x.shape[0], -1, rows.shape[1] * columns.shape[1])


@op("col2im")
def col2im(x: Any, size: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any, *, out: Any) -> Any:
    """Images of patches: the sums of what overlaps."""
    flat = x if x.ndim == 3 else x[None]
    shape = (flat.shape[0], flat.shape[1] // (kernel[0] * kernel[1]), *size)
    _, pullback = jax.vjp(lambda y: _patches(y, kernel, dilation, padding, stride), jnp.zeros(shape, x.dtype))
    return pullback(flat)[0].reshape(out.shape)
