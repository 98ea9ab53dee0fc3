"""Where numbers lie among edges, and how many lie there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dtypes import cast, category
from ..table import op
from .reductions import axes_of


def _search(edges: Any, x: Any, right: bool) -> Any:
    """Along the last axes of both, whose others are equal, or with one row of edges for all."""
    side = "right" if right else "left"
    if edges.ndim <= 1:
        return jnp.searchsorted(edges, x, side=side)
    rows = edges.reshape(-1, edges.shape[-1]), x.reshape(-1, x.shape[-1])
    return jax.vmap(lambda e, y: jnp.searchsorted(e, y, side=side))(*rows).reshape(x.shape)


@op("bucketize")
def bucketize(x: Any, edges: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """Between which edges a number lies."""
    return _search(edges, jnp.asarray(x), right)


@op("searchsorted")
def searchsorted(
    edges: Any, x: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Any = None
) -> Any:
    """The same, the edges in an order that may be given."""
    edges = edges if sorter is None else jnp.take_along_axis(edges, sorter, axis=-1)
    return _search(edges, jnp.asarray(x), right or side == "right")


@op("bincount")
def bincount(x: Any, weights: Any = None, minlength: int = 0, *, out: Any) -> Any:
    """How often each integer occurs."""
    return jnp.zeros(out.shape, out.dtype).at[x].add(1 if weights is None else cast(weights, out.dtype))


@op("nonzero_static")
def nonzero_static(x: Any, *, size: int, fill_value: int = -1) -> Any:
    """The first places of what is not zero."""
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill_value), -1) if x.ndim else jnp.zeros((size, 0), int)


def _edges(x: Any, n: int, bounds: Sequence[float] | None) -> Any:
    return jnp.histogram_bin_edges(x, n, None if bounds is None else tuple(bounds)).astype(x.dtype)


def _counted(x: Any, edges: Sequence[Any], weight: Any, density: bool) -> Any:
    """Of points, rows of `x`: how many lie in each cell."""
    shape = tuple(len(e) - 1 for e in edges)
    inside, place = jnp.ones(len(x), bool), []
    for column, e in zip(x.T, edges, strict=True):
        at = jnp.searchsorted(e, column, side="right") - 1
        at = jnp.where(column == e[-1], len(e) - 2, at)  # the last edge is of the last cell
        inside &= (column >= e[0]) & (column <= e[-1])
        place.append(at)
    given = jnp.ones(len(x), x.dtype) if weight is None else cast(weight.ravel(), x.dtype)
    found = jnp.zeros(shape, x.dtype).at[tuple(place)].add(jnp.where(inside, given, 0))
    if density:
        for axis, e in enumerate(edges):
            found = found / jnp.expand_dims(jnp.diff(e), [i for i in range(len(edges)) if i != axis])
        found = found / jnp.where(inside, given, 0).sum()
    return found


@op("histogram.bin_ct")
def histogram(
    x: Any, bins: int = 100, *, range: Sequence[float] | None = None, weight: Any = None, density: bool = False
) -> Any:
    """How many numbers lie in each of as many cells, and the edges of these."""
    edges = _edges(x, bins, range)
    return _counted(x.reshape(-1, 1), [edges], weight, density), edges


@op("histogram.bins_tensor")
def histogram_between(x: Any, bins: Any, *, weight: Any = None, density: bool = False) -> Any:
    """The same between edges that are given."""
    return _counted(x.reshape(-1, 1), [bins], weight, density), bins


@op("_histogramdd_bin_edges")
def histogramdd_edges(
    x: Any,
    bins: Sequence[int],
    *,
    range: Sequence[float] | None = None,
    weight: Any = None,
    density: bool = False,
) -> Any:
    """The edges of cells of points of several coordinates."""
    points = x.reshape(-1, x.shape[-1])
    bounds = [None] * len(bins) if range is None else [tuple(range[2 * i : 2 * i + 2]) for i, _ in enumerate(bins)]
    return [_edges(points[:, i], n, b) for i, (n, b) in enumerate(zip(bins, bounds, strict=True))]


@op("_histogramdd_from_bin_cts")
def histogramdd(
    x: Any,
    bins: Sequence[int],
    *,
    range: Sequence[float] | None = None,
    weight: Any = None,
    density: bool = False,
) -> Any:
    """How many points lie in each cell."""
    return histogramdd_between(x, histogramdd_edges(x, bins, range=range), weight=weight, density=density)


@op("_histogramdd_from_bin_tensors")
def histogramdd_between(x: Any, bins: Sequence[Any], *, weight: Any = None, density: bool = False) -> Any:
    """The same between edges that are given."""
    return _counted(x.reshape(-1, x.shape[-1]), bins, weight, density)


@op("hash_tensor")
def hash_tensor(x: Any, dim: int | Sequence[int] = (), *, keepdim: bool = False, mode: int = 0, out: Any) -> Any:
    """Which bits an odd number of numbers has, of their bits in the width of the result."""
    kind = "float" if category(x.dtype) == 2 else "int"
    wide = cast(x, f"{kind}{8 * out.dtype.itemsize}")
    bits = lax.bitcast_convert_type(wide, out.dtype)
    found = lax.reduce(bits, jnp.zeros((), out.dtype), lax.bitwise_xor, axes_of(x, dim))
    return found.reshape(out.shape)
