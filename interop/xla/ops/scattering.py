"""Scatters: positions replaced by, or reduced with, what falls there. Negative indices count from the end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..dtypes import Number, cast
from ..table import op
from .indexing import positions


@op("scatter.src", "scatter.value")
def scatter(x: Any, dim: int, at: Any, source: Any) -> Any:
    """With positions along an axis replaced."""
    return _scattered(x, dim, at, source, "set")


@op("scatter_add")
def scatter_add(x: Any, dim: int, at: Any, source: Any) -> Any:
    """With positions along an axis added to."""
    return _scattered(x, dim, at, source, "add")


@op("scatter.reduce", "scatter.value_reduce")
def scatter_with(x: Any, dim: int, at: Any, source: Any, *, reduce: str) -> Any:
    """With positions along an axis added to, or multiplied."""
    return _scattered(x, dim, at, source, reduce)


def _scattered(x: Any, dim: int, at: Any, source: Any, how: str) -> Any:
    shape, whole = x.shape, jnp.atleast_1d(x)
    at = jnp.atleast_1d(at)
    values = cast(source, x.dtype)
    if values.ndim or isinstance(source, Number) is False:
        values = jnp.atleast_1d(values)
        values = values[tuple(slice(n) for n in at.shape)]
    return getattr(whole.at[positions(whole, dim, at)], how)(values).reshape(shape)


@op("scatter_reduce.two")
def scatter_reduce(x: Any, dim: int, at: Any, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    """With positions along an axis reduced with what falls there."""
    how = {"sum": "add", "prod": "multiply", "mean": "add", "amax": "max", "amin": "min"}[reduce]
    if not include_self:
        neutral = {"sum": 0, "mean": 0, "prod": 1, "amax": _lowest(x.dtype), "amin": _highest(x.dtype)}[reduce]
        hit = _scattered(jnp.zeros(x.shape, bool), dim, at, jnp.ones(at.shape, bool), "set")
        x = jnp.where(hit, jnp.asarray(neutral, x.dtype), x)
    found = _multiplied(x, dim, at, source) if reduce == "prod" else _scattered(x, dim, at, source, how)
    if reduce != "mean":
        return found
    ones = jnp.ones(x.shape, jnp.int32) if include_self else jnp.zeros(x.shape, jnp.int32)
    count = jnp.maximum(_scattered(ones, dim, at, jnp.ones(at.shape, jnp.int32), "add"), 1)
    return found / count.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else found // count.astype(x.dtype)


def _multiplied(x: Any, dim: int, at: Any, source: Any) -> Any:
    """With positions along an axis multiplied by what falls there: by a table of what falls where, since JAX's scatter
    of products has no derivative."""
    shape, x = x.shape, jnp.atleast_1d(x)
    at, source = jnp.atleast_1d(at), jnp.atleast_1d(source)
    source = source[tuple(slice(n) for n in at.shape)]
    dim %= x.ndim
    more = [(0, 0 if axis == dim else n - m) for axis, (n, m) in enumerate(zip(x.shape, at.shape, strict=True))]
    at = jnp.pad(jnp.where(at < 0, at + x.shape[dim], at), more, constant_values=x.shape[dim])  # which is nowhere
    source = jnp.pad(cast(source, x.dtype), more)
    at, source = jnp.moveaxis(at, dim, -1)[..., None, :], jnp.moveaxis(source, dim, -1)[..., None, :]
    factors = jnp.prod(jnp.where(at == jnp.arange(x.shape[dim])[:, None], source, 1), -1)
    return (x * jnp.moveaxis(factors, -1, dim).astype(x.dtype)).reshape(shape)


def _lowest(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


@op("index_reduce")
def index_reduce(x: Any, dim: int, at: Any, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    """With positions of an axis reduced with what falls there."""
    if not x.ndim:
        return scatter_reduce(
            x[None], 0, jnp.atleast_1d(at), jnp.atleast_1d(source), reduce, include_self=include_self
        )[0]
    at = jnp.expand_dims(jnp.atleast_1d(at), [axis for axis in range(x.ndim) if axis != dim % x.ndim])
    return scatter_reduce(x, dim, jnp.broadcast_to(at, source.shape), source, reduce, include_self=include_self)


@op("segment_reduce")
def segment_reduce(
    data: Any,
    reduce: str,
    *,
    lengths: Any = None,
    indices: Any = None,
    offsets: Any = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Number | None = None,
) -> Any:
    """Pieces of an axis, one after another, each reduced."""
    lengths = jnp.diff(offsets, axis=-1) if lengths is None else lengths
    if axis:
        within = functools.partial(segment_reduce, reduce=reduce, axis=axis - 1, initial=initial)
        return jax.vmap(lambda x, n: within(x, lengths=n))(data, lengths)
    neutral = {"sum": 0, "mean": 0, "prod": 1, "max": -jnp.inf, "min": jnp.inf}[reduce]
    start = jnp.full((lengths.shape[0], *data.shape[1:]), neutral if initial is None else initial, data.dtype)
    piece = jnp.searchsorted(jnp.cumsum(lengths), jnp.arange(data.shape[0]), side="right")
    how = {"max": "amax", "min": "amin", "mean": "sum"}.get(reduce, reduce)
    found = index_reduce(start, 0, piece, data, how)
    if reduce != "mean":
        return found
    n = lengths.reshape(-1, *[1] * (data.ndim - 1))
    return jnp.where(n > 0, found / jnp.maximum(n, 1), jnp.nan if initial is None else found)
