"""Order: sorted, the largest, the middle. NaN is larger than all."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..table import op
from .reductions import evenly


def _ordered(x: Any, dim: int, descending: bool) -> tuple[Any, Any]:
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    at = jnp.argsort(lax.stop_gradient(x), axis=dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, at, axis=dim), at


@op("sort.default")
def sort(x: Any, dim: int = -1, descending: bool = False) -> Any:
    """Sorted along an axis, and where each was; equal ones in their order."""
    return _ordered(x, dim, descending)


@op("sort.stable")
def sort_stable(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """The same."""
    return _ordered(x, dim, descending)


@op("argsort.default")
def argsort(x: Any, dim: int = -1, descending: bool = False) -> Any:
    """Where each was."""
    return _ordered(x, dim, descending)[1]


@op("argsort.stable")
def argsort_stable(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """The same."""
    return _ordered(x, dim, descending)[1]


@op("topk")
def topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """The largest of an axis, or the smallest, and where they are."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    at = _ordered(x, dim, largest)[1]
    at = lax.slice_in_dim(at, 0, k, axis=dim % x.ndim)
    return jnp.take_along_axis(x, at, axis=dim), at


def _chosen(x: Any, at: Any, dim: int, keepdim: bool) -> tuple[Any, Any]:
    value = jnp.take_along_axis(x, at, axis=dim)
    return (value, at) if keepdim else (jnp.squeeze(value, dim), jnp.squeeze(at, dim))


@op("kthvalue")
def kthvalue(x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th smallest of an axis, and where it is."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    at = lax.slice_in_dim(_ordered(x, dim, False)[1], k - 1, k, axis=dim % x.ndim)
    return _chosen(x, at, dim, keepdim)


def _middle(x: Any, dim: int, keepdim: bool, skips_nan: bool) -> tuple[Any, Any]:
    """The lower of the two in the middle; NaN if there is one, unless it is left out."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    at, nan = _ordered(x, dim, False)[1], x != x
    n, missing = x.shape[dim], jnp.sum(nan, dim, keepdims=True)
    k = jnp.maximum(n - missing - 1, 0) // 2 if skips_nan else jnp.where(missing > 0, n - missing, (n - 1) // 2)
    return _chosen(x, jnp.take_along_axis(at, k, axis=dim), dim, keepdim)


@op("median.dim")
def median_along(x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    """The median of an axis, and where it is."""
    return _middle(x, dim, keepdim, skips_nan=False)


@op("nanmedian.dim")
def nanmedian_along(x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    """The median of what is a number, and where it is."""
    return _middle(x, dim, keepdim, skips_nan=True)


@op("median.default")
def median(x: Any) -> Any:
    """The median."""
    return evenly(x, _middle(lax.stop_gradient(x.ravel()), 0, False, skips_nan=False)[0])


@op("nanmedian.default")
def nanmedian(x: Any) -> Any:
    """The median of what is a number."""
    return evenly(x, _middle(lax.stop_gradient(x.ravel()), 0, False, skips_nan=True)[0])


@op("mode")
def mode(x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    """The smallest of the most frequent numbers of an axis, and the last place where it is."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int32)
    rows = jnp.moveaxis(x, dim, -1)
    counts = jnp.sum(rows[..., :, None] == rows[..., None, :], -1)
    is_most = counts == jnp.max(counts, -1, keepdims=True)
    order = jnp.argsort(lax.stop_gradient(rows), axis=-1, stable=True)
    first = jnp.argmax(jnp.take_along_axis(is_most, order, -1), -1, keepdims=True)
    value = jnp.take_along_axis(rows, jnp.take_along_axis(order, first, -1), -1)
    last = x.shape[dim] - 1 - jnp.argmax(jnp.flip(rows == value, -1), -1, keepdims=True)
    return _chosen(x, jnp.moveaxis(last, -1, dim), dim, keepdim)


@op("isin.Tensor_Tensor", "isin.Tensor_Scalar", "isin.Scalar_Tensor")
def isin(x: Any, among: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    """Whether each is among others."""
    return jnp.isin(x, among, invert=invert)


@op("histc")
def histc(x: Any, bins: int = 100, low: float = 0, high: float = 0) -> Any:
    """How many numbers lie in each bin; without bounds, between the smallest and the largest."""
    flat = x.ravel()
    bounds = (jnp.min(flat), jnp.max(flat)) if low == high else (low, high)
    return jax.lax.stop_gradient(jnp.histogram(flat, bins, bounds)[0].astype(x.dtype))
