"""Pooling: windows of the last axes. The number of windows is told by the shape of the result, `ceil_mode` or not."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..dtypes import category, opmath
from ..table import Size, op
from .convolution import _each


def _widths(x: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[tuple[int, Size]]:
    """How much to pad the last axes, or to cut, so that as many windows fit as the result has."""
    n = len(kernel)
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(out[-n:], stride, dilation, kernel, strict=True)]
    return [(p, r - size - p) for p, r, size in zip(padding, reach, x.shape[-n:], strict=True)]


@op("max_pool1d_with_indices")
def max_pool1d(x: Any, *options: Any, out: Any) -> Any:
    """The maxima of windows of one axis."""
    return _max_pool(x, 1, *options, out=out)


@op("max_pool2d_with_indices")
def max_pool2d(x: Any, *options: Any, out: Any) -> Any:
    """The maxima of windows of two axes, and where they are."""
    return _max_pool(x, 2, *options, out=out)


@op("max_pool3d_with_indices")
def max_pool3d(x: Any, *options: Any, out: Any) -> Any:
    """The maxima of windows of three axes, and where they are."""
    return _max_pool(x, 3, *options, out=out)


def _max_pool(
    x: Any,
    n: int,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    out: Any,
) -> Any:
    """Of equal numbers the first has the derivative, and NaN is the largest: one position of the window at a time."""
    kernel, padding, dilation = (_each(v, n) for v in (kernel, padding, dilation))
    stride = kernel if isinstance(stride, list | tuple) and not stride else _each(stride, n)
    shape = out[0].shape
    widths = _widths(x, shape, kernel, stride, padding, dilation)
    lowest = -jnp.inf if category(x.dtype) == 2 else jnp.iinfo(x.dtype).min
    lead = [(0, 0, 0)] * (x.ndim - n)
    padded = lax.pad(x, jnp.asarray(lowest, x.dtype), lead + [(*w, 0) for w in widths])
    places = lax.iota(jnp.int32, math.prod(x.shape[-n:])).reshape(x.shape[-n:])
    numbers = lax.pad(places, jnp.int32(-1), [(*w, 0) for w in widths])
    best: Any = None
    at: Any = None
    for offset in itertools.product(*map(range, kernel)):
        starts = [o * d for o, d in zip(offset, dilation, strict=True)]
        ends = [b + (m - 1) * s + 1 for b, m, s in zip(starts, shape[-n:], stride, strict=True)]
        value, number = (_last_axes(y, starts, ends, stride) for y in (padded, numbers))
        if best is None:
            best, at = value, jnp.broadcast_to(number, value.shape)
            continue
        takes = (value > best) | (value != value) | ((at < 0) & (number >= 0))
        best, at = jnp.where(takes, value, best), jnp.where(takes, number, at)
    return best, at


def _last_axes(x: Any, starts: Sequence[int], ends: Sequence[Size], steps: Sequence[int]) -> Any:
    lead = x.shape[: x.ndim - len(starts)]
    return lax.slice(x, (*(0,) * len(lead), *starts), (*lead, *ends), (*(1,) * len(lead), *steps))


@op("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Any,
) -> Any:
    """The means of windows."""
    n = len(kernel) if len(kernel) > 1 else 1
    kernel, padding = _each(kernel, n), _each(padding, n)
    stride = _each(stride, n) if isinstance(stride, int) or len(stride) else kernel
    widths = _widths(x, out.shape, kernel, stride, padding, (1,) * n)
    wide = x.astype(opmath(x.dtype))
    lead = x.ndim - n
    padded = lax.pad(wide, jnp.zeros((), wide.dtype), [(0, 0, 0)] * lead + [(*w, 0) for w in widths])
    summed = lax.reduce_window(
        padded, np.zeros((), wide.dtype), lax.add, (*(1,) * lead, *kernel), (*(1,) * lead, *stride), "VALID"
    )
    if divisor_override is not None:
        return summed / divisor_override
    counts: Any = np.ones((1,) * n)
    for axis, (size, m, k, s, p) in enumerate(zip(x.shape[-n:], out.shape[-n:], kernel, stride, padding, strict=True)):
        along: Any = np if isinstance(m, int) and isinstance(size, int) else jnp
        starts = along.arange(m) * s - p
        ends = along.minimum(starts + k, size + p)
        count = ends - starts if count_include_pad else along.minimum(ends, size) - along.maximum(starts, 0)
        counts = counts * count.reshape([-1 if i == axis else 1 for i in range(n)])
    return summed / counts.astype(wide.dtype)


def _bins(size: Size, n: Size) -> tuple[Any, Any]:
    """Where the windows of adaptive pooling begin and end."""
    i = (np if isinstance(size, int) and isinstance(n, int) else jnp).arange(n)
    return i * size // n, -((-(i + 1) * size) // n)


@op("adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_avg_pool(x: Any, sizes: Sequence[Size], *, out: Any) -> Any:
    """The means of as many windows as are asked for."""
    n, wide = len(sizes), x.astype(opmath(x.dtype))
    for axis in range(x.ndim - n, x.ndim):
        size, m = x.shape[axis], out.shape[axis]
        starts, ends = _bins(size, m)
        place = jnp.arange(size)
        weights = ((place >= starts[:, None]) & (place < ends[:, None])) / (ends - starts)[:, None]
        wide = jnp.moveaxis(jnp.tensordot(wide, weights.astype(wide.dtype), [[axis], [1]]), -1, axis)
    return wide


@op("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(x: Any, sizes: Sequence[Size], *, out: Any) -> Any:
    """The maxima of as many windows as are asked for, and where they are."""
    n = len(sizes)
    shape, inner = out[0].shape, x.shape[-n:]
    places, valid = np.zeros((1,) * 2 * n, int), np.ones((1,) * 2 * n, bool)
    for axis, (size, m) in enumerate(zip(inner, shape[-n:], strict=True)):
        starts, ends = _bins(size, m)
        offsets = np.arange((ends - starts).max())
        at = starts[:, None] + offsets
        form = [1] * 2 * n
        form[axis], form[n + axis] = at.shape
        stride = math.prod(inner[axis + 1 :])
        places = places + np.minimum(at, size - 1).reshape(form) * stride
        valid = valid & (at < ends[:, None]).reshape(form)
    places, valid = places.reshape(*shape[-n:], -1), valid.reshape(*shape[-n:], -1)
    windows = x.reshape(*x.shape[:-n], -1)[..., places]
    windows = jnp.where(valid, windows, -jnp.inf)
    at = jnp.argmax(lax.stop_gradient(windows), -1)[..., None]
    best = jnp.take_along_axis(windows, at, -1)[..., 0]
    return best, jnp.take_along_axis(jnp.broadcast_to(places, windows.shape), at, -1)[..., 0]


@op("fractional_max_pool2d", "fractional_max_pool3d")
def fractional_max_pool(x: Any, kernel: Sequence[int], sizes: Sequence[int], samples: Any, *, out: Any) -> Any:
    """The maxima of windows whose places are random, for each example and channel others, and where they are.

    Source: Graham, "Fractional max-pooling" (2014).
    """
    n = len(kernel)
    inner, planes = x.shape[-n:], (*samples.shape[:2],)
    order = (1, 0) if n == 2 else (0, 1, 2)  # of images, the first sample is for the last axis
    places: Any = 0
    for axis, (size, k, m) in enumerate(zip(inner, kernel, sizes, strict=True)):
        u = samples[..., order[axis], None]
        alpha = jnp.asarray(size - k, u.dtype) / max(m - 1, 1)
        starts = jnp.trunc((jnp.arange(m, dtype=u.dtype) + u) * alpha) - jnp.trunc(u * alpha)
        starts = starts.astype(jnp.int32).at[..., m - 1].set(size - k)
        at = starts[..., None] + jnp.arange(k)
        form = [1] * 2 * n
        form[axis], form[n + axis] = m, k
        places = places + at.reshape(*planes, *form) * math.prod(inner[axis + 1 :])
    at = places.reshape(*planes, *sizes, -1)
    windows = jnp.take_along_axis(x.reshape(*planes, -1), at.reshape(*planes, -1), -1).reshape(at.shape)
    first = jnp.argmax(lax.stop_gradient(windows), -1)[..., None]
    best = jnp.take_along_axis(windows, first, -1), jnp.take_along_axis(at, first, -1)
    return tuple(y.reshape(aval.shape) for y, aval in zip(best, out, strict=True))
