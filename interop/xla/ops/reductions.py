"""Reductions over axes, and running ones along an axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dtypes import cast, category, opmath
from ..promotion import promoting
from ..table import op
from .elementwise import absolute

Axes = int | Sequence[int] | None


def axes_of(x: Any, dim: Axes) -> tuple[int, ...]:
    """The axes of a reduction: all, where none is named."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(x.ndim))
    dims = (dim,) if isinstance(dim, int) else dim
    return tuple(d % x.ndim if x.ndim else 0 for d in dims) if x.ndim else ()


@op("sum")
def total(x: Any, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """The sum."""
    return jnp.sum(cast(x, opmath(out.dtype)), axes_of(x, dim), keepdims=keepdim)


@op("nansum")
def nansum(x: Any, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """The sum of what is a number."""
    x = cast(x, opmath(out.dtype))
    return jnp.sum(jnp.where(jnp.isnan(x), 0, x), axes_of(x, dim), keepdims=keepdim)


@op("mean")
def mean(x: Any, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """The mean."""
    return jnp.mean(cast(x, opmath(out.dtype)), axes_of(x, dim), keepdims=keepdim)


@op("prod")
def prod(x: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """The product."""
    return jnp.prod(cast(x, opmath(out.dtype)), axes_of(x, dim), keepdims=keepdim)


@op("any", "_is_any_true")
def anything(x: Any, dim: Axes = None, keepdim: bool = False) -> Any:
    """Whether one is not zero."""
    return jnp.any(x != 0, axes_of(x, dim), keepdims=keepdim)


@op("all", "_is_all_true")
def everything(x: Any, dim: Axes = None, keepdim: bool = False) -> Any:
    """Whether none is zero."""
    return jnp.all(x != 0, axes_of(x, dim), keepdims=keepdim)


@op("count_nonzero")
def count_nonzero(x: Any, dim: Axes = None) -> Any:
    """How many are not zero."""
    return jnp.sum(x != 0, axes_of(x, dim))


# --- extrema -------------------------------------------------------------------------------------


@op("amax", "max.default")
def amax(x: Any, dim: Axes = None, keepdim: bool = False) -> Any:
    """The largest; a derivative goes to equal ones in equal parts."""
    return _extreme(x, axes_of(x, dim), keepdim, jnp.max)


@op("amin", "min.default")
def amin(x: Any, dim: Axes = None, keepdim: bool = False) -> Any:
    """The smallest."""
    return _extreme(x, axes_of(x, dim), keepdim, jnp.min)


def _extreme(x: Any, axes: tuple[int, ...], keepdim: bool, reduce: Any) -> Any:
    if category(x.dtype) < 2:
        return reduce(x, axes, keepdims=keepdim)
    value = evenly(x, lax.stop_gradient(reduce(x, axes, keepdims=True)), axes)
    return value if keepdim else lax.squeeze(value, axes)


def evenly(x: Any, found: Any, axes: tuple[int, ...] | None = None) -> Any:
    """What was found among x, with a derivative that goes to all that equal it in equal parts."""
    if category(x.dtype) < 2:
        return found
    here = lax.stop_gradient((x == found) | (jnp.isnan(found) & jnp.isnan(x)))
    count = jnp.sum(here, axes, keepdims=True).astype(x.dtype)
    parts = jnp.sum(jnp.where(here, _zero_like(x), 0) / count, axes, keepdims=True)
    return found + parts.reshape(found.shape)


@jax.custom_jvp
def _zero_like(x: Any) -> Any:
    """Zero, with the derivative of x."""
    return jnp.zeros_like(x)


@_zero_like.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return jnp.zeros_like(primals[0]), tangents[0]


@op("aminmax")
def aminmax(x: Any, *, dim: int | None = None, keepdim: bool = False) -> Any:
    """Both."""
    return amin(x, dim, keepdim), amax(x, dim, keepdim)


def _first(x: Any, dim: int, largest: bool) -> Any:
    """The position of an extreme along an axis; NaN is one."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.int8)
    return (jnp.argmax if largest else jnp.argmin)(x, axis=dim)


def _along(x: Any, dim: int, keepdim: bool, largest: bool) -> Any:
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    at = jnp.expand_dims(_first(lax.stop_gradient(x), dim, largest), dim)
    found = jnp.take_along_axis(x, at, axis=dim)
    return (found, at) if keepdim else (jnp.squeeze(found, dim), jnp.squeeze(at, dim))


@op("max.dim")
def max_along(x: Any, dim: int, keepdim: bool = False) -> Any:
    """The largest along an axis, and where it is."""
    return _along(x, dim, keepdim, True)


@op("min.dim")
def min_along(x: Any, dim: int, keepdim: bool = False) -> Any:
    """The smallest along an axis, and where it is."""
    return _along(x, dim, keepdim, False)


@op("argmax")
def argmax(x: Any, dim: int | None = None, keepdim: bool = False, *, out: Any) -> Any:
    """Where the largest is."""
    return _position(x, dim, True).reshape(out.shape)


@op("argmin")
def argmin(x: Any, dim: int | None = None, keepdim: bool = False, *, out: Any) -> Any:
    """Where the smallest is."""
    return _position(x, dim, False).reshape(out.shape)


def _position(x: Any, dim: int | None, largest: bool) -> Any:
    return _first(x.ravel(), 0, largest) if dim is None or not x.ndim else _first(x, dim, largest)


# --- variance and norms --------------------------------------------------------------------------


def _spread(x: Any, dim: Axes, unbiased: bool | None, correction: Any, keepdim: bool) -> Any:
    """Variance and mean. torch's overloads have `unbiased` in the place of a correction of one or zero."""
    axes = axes_of(x, dim)
    correction = (1 if unbiased in (True, None) else 0) if correction is None else correction
    n = 1
    for axis in axes:
        n *= x.shape[axis]
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    squares = centred.real**2 + centred.imag**2 if category(x.dtype) == 3 else centred * centred
    free = max(n - correction, 0)
    size = jnp.sum(squares, axes, keepdims=True)
    variance = size / free if free else size / jnp.zeros((), size.dtype)
    return (variance, mean) if keepdim else (lax.squeeze(variance, axes), lax.squeeze(mean, axes))


def root(x: Any) -> Any:
    """The square root, whose derivative at zero is zero."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _arguments(dim: Any, unbiased: Any, keepdim: bool) -> tuple[Axes, bool | None, bool]:
    if isinstance(dim, bool):  # the overload that reduces all has `unbiased` first
        return None, dim, keepdim
    return dim, unbiased, keepdim


@op("var")
def var(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None, out: Any
) -> Any:
    """The variance."""
    dim, unbiased, keepdim = _arguments(dim, unbiased, keepdim)
    return _spread(_wide(x, out), dim, unbiased, correction, keepdim)[0]


@op("std")
def std(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None, out: Any
) -> Any:
    """The standard deviation; where it is zero, so is its derivative."""
    return root(var(x, dim, unbiased, keepdim, correction=correction, out=out))


@op("var_mean")
def var_mean(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None, out: Any
) -> Any:
    """The variance and the mean."""
    dim, unbiased, keepdim = _arguments(dim, unbiased, keepdim)
    return _spread(_wide(x, out[0]), dim, unbiased, correction, keepdim)


@op("std_mean")
def std_mean(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None, out: Any
) -> Any:
    """The standard deviation and the mean."""
    variance, mean = var_mean(x, dim, unbiased, keepdim, correction=correction, out=out)
    return root(variance), mean


def _wide(x: Any, out: Any) -> Any:
    return cast(x, opmath(x.dtype if category(x.dtype) == 3 else out.dtype))


@op("linalg_vector_norm")
def vector_norm(x: Any, ord: Any = 2, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """A norm; where it is zero, so is its derivative."""
    x, axes = _wide(x, out), axes_of(x, dim)
    if ord == 2 or (ord == 1 and category(x.dtype) == 3):
        squares = x.real**2 + x.imag**2 if category(x.dtype) == 3 else x * x
        return (
            root(jnp.sum(squares, axes, keepdims=keepdim))
            if ord == 2
            else jnp.sum(root(squares), axes, keepdims=keepdim)
        )
    size = absolute(x) if category(x.dtype) < 3 else root(x.real**2 + x.imag**2)
    if ord == float("inf"):
        return _extreme(size, axes, keepdim, jnp.max)
    if ord == float("-inf"):
        return _extreme(size, axes, keepdim, jnp.min)
    if ord == 0:
        return jnp.sum(size != 0, axes, keepdims=keepdim)
    if ord == 1:
        return jnp.sum(size, axes, keepdims=keepdim)
    zero = size == 0
    powers = jnp.where(zero, 0.0 if ord > 0 else jnp.inf, jnp.where(zero, 1, size) ** ord)
    summed = jnp.sum(powers, axes, keepdims=keepdim)
    none = summed == 0
    return jnp.where(none, 0, jnp.where(none, 1, summed) ** (1 / ord))


@op("norm")
def norm(x: Any, p: Any = 2, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None, out: Any) -> Any:
    """A vector norm, by its older name."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim, out=out)


@op("logsumexp", "special_logsumexp")
def logsumexp(x: Any, dim: Axes, keepdim: bool = False, *, out: Any) -> Any:
    """The logarithm of the sum of exponentials."""
    return jax.nn.logsumexp(cast(x, opmath(out.dtype)), axes_of(x, dim), keepdims=keepdim)


# --- along an axis -------------------------------------------------------------------------------


@op("cumsum")
def cumsum(x: Any, dim: int, *, dtype: Any = None, out: Any) -> Any:
    """Running sums."""
    return jnp.cumsum(cast(x, opmath(out.dtype)), dim) if x.ndim else x


@op("cumprod")
def cumprod(x: Any, dim: int, *, dtype: Any = None, out: Any) -> Any:
    """Running products."""
    return jnp.cumprod(cast(x, opmath(out.dtype)), dim) if x.ndim else x


@op("logcumsumexp")
def logcumsumexp(x: Any, dim: int, *, out: Any) -> Any:
    """Running logarithms of sums of exponentials."""
    return lax.cumlogsumexp(cast(x, opmath(out.dtype)), dim % x.ndim) if x.ndim else x


def _running(x: Any, dim: int, takes: Any) -> Any:
    """Running extremes and where they are: of equal ones, the last."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    dim %= x.ndim
    places = lax.broadcasted_iota(jnp.int32, x.shape, dim)

    def later(a: Any, b: Any) -> Any:
        (x, i), (y, j) = a, b
        is_later = takes(y, x)
        return jnp.where(is_later, y, x), jnp.where(is_later, j, i)

    _, at = lax.associative_scan(later, (lax.stop_gradient(x), places), axis=dim)
    return jnp.take_along_axis(x, at, axis=dim), at


@op("cummax")
def cummax(x: Any, dim: int) -> Any:
    """Running maxima."""
    return _running(x, dim, lambda y, x: (y >= x) | (y != y))


@op("cummin")
def cummin(x: Any, dim: int) -> Any:
    """Running minima."""
    return _running(x, dim, lambda y, x: (y <= x) | (y != y))
