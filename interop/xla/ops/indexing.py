"""Indexing: gathers, scatters, tables of embeddings. Negative indices count from the end."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..dtypes import Number, cast
from ..table import op


def _indices(x: Any, indices: Sequence[Any]) -> tuple[Any, ...] | None:
    """JAX's index; None if a mask decides about shapes."""
    given = []
    for i in indices:
        if i is not None and i.dtype == jnp.bool_:
            return None
        given.append(slice(None) if i is None else i)
    return tuple(given)


@op("index", "_unsafe_index")
def index(x: Any, indices: Sequence[Any], *, out: Any) -> Any:
    """Positions by arrays of indices, or by one mask that is known beforehand."""
    found = _indices(x, indices) or _by_mask(indices, out)
    return x[found].reshape(out.shape)


def _by_mask(indices: Sequence[Any], out: Any) -> tuple[Any, ...]:
    lead = next(n for n, i in enumerate(indices) if i is not None)
    assert all(i is None for i in indices[lead + 1 :]), "a mask beside other indices"
    return (slice(None),) * lead + jnp.nonzero(indices[lead], size=out.shape[lead])


@op("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False, unsafe: bool = False) -> Any:
    """With positions replaced, or added to."""
    values, found = cast(values, x.dtype), _indices(x, indices)
    if found is None:
        return _masked_put(x, indices, values, accumulate)
    return x.at[found].add(values) if accumulate else x.at[found].set(values)


def _masked_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool) -> Any:
    """A mask over leading axes and one value for each that it chooses, the same or by their order."""
    masks = [i for i in indices if i is not None]
    assert len(masks) == 1, "a mask beside other indices"
    lead = next(n for n, i in enumerate(indices) if i is not None)
    mask = masks[0]
    whole = mask.reshape((1,) * lead + mask.shape + (1,) * (x.ndim - lead - mask.ndim))
    inner = x.shape[lead + mask.ndim :]
    if values.ndim > len(inner) and values.shape[values.ndim - len(inner) - 1] != 1:
        order = jnp.cumsum(mask.ravel()) - 1
        rows = values.reshape(-1, *inner)[jnp.clip(order, 0, None)].reshape(*mask.shape, *inner)
        values = jnp.broadcast_to(rows, x.shape)
    elif values.ndim > len(inner):
        values = values.reshape(*values.shape[: values.ndim - len(inner) - 1], *inner)
    return jnp.where(whole, x + values if accumulate else values, x)


@op("masked_fill")
def masked_fill(x: Any, mask: Any, value: Any, *, out: Any) -> Any:
    """A value where a mask holds."""
    return jnp.where(mask, cast(value, out.dtype), x)


@op("masked_scatter")
def masked_scatter(x: Any, mask: Any, source: Any) -> Any:
    """Values in their order where a mask holds."""
    x, mask = jnp.broadcast_arrays(x, mask)
    order = jnp.clip(jnp.cumsum(mask.ravel()) - 1, 0, None)
    return jnp.where(mask, source.ravel()[order].reshape(x.shape), x) if source.size else x


@op("masked_select")
def masked_select(x: Any, mask: Any, *, out: Any) -> Any:
    """Values in their order where a mask holds that is known beforehand."""
    x, mask = jnp.broadcast_arrays(x, mask)
    return x.ravel()[jnp.flatnonzero(mask, size=out.shape[0])]


def positions(x: Any, dim: int, at: Any) -> tuple[Any, ...]:
    """For each element of `at`, its place in `x`, whose position along an axis it gives."""
    places = [lax.broadcasted_iota(jnp.int32, at.shape, axis) for axis in range(at.ndim)]
    places[dim % x.ndim] = at
    return tuple(places)


@op("gather")
def gather(x: Any, dim: int, at: Any, *, sparse_grad: bool = False) -> Any:
    """Positions along an axis, for each element others."""
    if not x.ndim:
        return jnp.broadcast_to(x, at.shape)
    return x[positions(x, dim, at)] if at.ndim else x[at]


@op("index_select")
def index_select(x: Any, dim: int, at: Any) -> Any:
    """Positions of an axis."""
    return jnp.take(x, jnp.atleast_1d(at), axis=dim) if x.ndim else x


def _on_axis(x: Any, dim: int, at: Any) -> tuple[Any, ...]:
    return (slice(None),) * (dim % x.ndim) + (jnp.atleast_1d(at),)


@op("index_add")
def index_add(x: Any, dim: int, at: Any, source: Any, *, alpha: Number = 1) -> Any:
    """With positions of an axis added to."""
    if not x.ndim:
        return x + alpha * jnp.sum(source)
    return x.at[_on_axis(x, dim, at)].add(source if alpha == 1 else cast(alpha * source, x.dtype))


@op("index_copy")
def index_copy(x: Any, dim: int, at: Any, source: Any) -> Any:
    """With positions of an axis replaced."""
    return x.at[_on_axis(x, dim, at)].set(source) if x.ndim else source.reshape(())


@op("index_fill")
def index_fill(x: Any, dim: int, at: Any, value: Any) -> Any:
    """With positions of an axis set to a value."""
    return x.at[_on_axis(x, dim, at)].set(cast(value, x.dtype)) if x.ndim else jnp.asarray(cast(value, x.dtype))


@op("take")
def take(x: Any, at: Any) -> Any:
    """Positions of the flattened array."""
    return x.ravel()[at]


@op("put")
def put_flat(x: Any, at: Any, source: Any, accumulate: bool = False) -> Any:
    """With positions of the flattened array replaced, or added to."""
    flat, at, source = x.ravel(), at.ravel(), source.ravel()
    return (flat.at[at].add(source) if accumulate else flat.at[at].set(source)).reshape(x.shape)


@op("embedding")
def embedding(
    weight: Any, at: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """Rows of a table; the one for padding has no derivative."""
    rows = weight[at]
    if padding_idx >= 0:
        rows = jnp.where((at == padding_idx)[..., None], lax.stop_gradient(rows), rows)
    if scale_grad_by_freq:
        count = jnp.zeros(weight.shape[0], weight.dtype).at[at].add(1)[at][..., None]
        still = lax.stop_gradient(rows)
        rows = still + (rows - still) / count
    return rows


@op("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    weight: Any,
    at: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    *,
    out: Any,
) -> Any:
    """Sums, means or maxima of rows of a table, of bags that begin at offsets."""
    n_bags = out[0].shape[0]
    starts = offsets[:n_bags]
    bag = jnp.searchsorted(starts, jnp.arange(at.shape[0]), side="right") - 1
    rows = embedding(weight, at, padding_idx, scale_grad_by_freq)
    counted = at != padding_idx
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    size = jnp.zeros(n_bags, jnp.int32).at[bag].add(counted.astype(jnp.int32))
    if mode == 2:
        low = jnp.full((n_bags, weight.shape[1]), -jnp.inf, weight.dtype)
        found = low.at[bag].max(jnp.where(counted[:, None], rows, -jnp.inf))
        found = jnp.where((size == 0)[:, None], 0, found)
    else:
        found = jnp.zeros((n_bags, weight.shape[1]), weight.dtype)
        found = found.at[bag].add(jnp.where(counted[:, None], rows, 0))
        if mode == 1:
            found = found / jnp.maximum(size, 1)[:, None].astype(found.dtype)
    rest = [bag, size, jnp.zeros(out[3].shape, out[3].dtype)]
    return found, *(
        x if x.shape == aval.shape else jnp.zeros(aval.shape) for x, aval in zip(rest, out[1:], strict=True)
    )


@op("_one_hot")
def one_hot(x: Any, classes: int = -1, *, out: Any) -> Any:
    """One where the class is."""
    return x[..., None] == jnp.arange(out.shape[-1])
