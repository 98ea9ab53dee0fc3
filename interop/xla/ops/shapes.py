"""Shapes: views, joins, splits, copies. Most are told by the shape of the result."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..dtypes import cast
from ..table import Size, op
from ..windows import put


@op("view.default", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "squeeze", "unsqueeze")
def reshape(x: Any, *rest: Any, out: Any, **options: Any) -> Any:
    """Another shape, in the same order."""
    return jnp.reshape(x, out.shape)


@op("expand")
def expand(x: Any, *rest: Any, out: Any, **options: Any) -> Any:
    """Repeated along axes of size one."""
    return jnp.broadcast_to(x, out.shape)


@op(
    "alias",
    "clone",
    "contiguous",
    "detach",
    "detach_copy",
    "lift_fresh",
    "lift_fresh_copy",
    "lift",
    "_to_copy",
    "to",
    "resolve_conj",
    "resolve_neg",
    "_conj_copy",
    "alias_copy",
    "prims::view_of",
    "prims::convert_element_type",
    "prims::device_put",
    "_to_cpu",
)
def same(x: Any, *rest: Any, **options: Any) -> Any:
    """The same values; a dtype is that of the result."""
    return x


@op("copy")
def copy(x: Any, source: Any, non_blocking: bool = False, *, out: Any) -> Any:
    """Other values in a tensor's place."""
    return jnp.broadcast_to(cast(source, out.dtype), out.shape)


@op("permute", "prims::transpose")
def permute(x: Any, dims: Sequence[int]) -> Any:
    """Axes in another order."""
    return jnp.transpose(x, [d % x.ndim for d in dims]) if x.ndim else x


@op("transpose", "swapaxes", "swapdims")
def transpose(x: Any, a: int, b: int) -> Any:
    """Two axes exchanged."""
    return jnp.swapaxes(x, a, b) if x.ndim else x


@op("t", "numpy_T")
def matrix_transpose(x: Any) -> Any:
    """Both axes exchanged."""
    return x.T


@op("slice")
def take_slice(x: Any, dim: int = 0, start: Size = None, end: Size = None, step: int = 1) -> Any:
    """A slice of an axis."""
    return x[_part(x, dim, start, end, step)]


@op("slice_scatter")
def slice_scatter(x: Any, source: Any, dim: int = 0, start: Size = None, end: Size = None, step: int = 1) -> Any:
    """With a slice of an axis replaced."""
    return x.at[_part(x, dim, start, end, step)].set(cast(source, x.dtype))


def _part(x: Any, dim: int, start: Size, end: Size, step: int) -> tuple[slice, ...]:
    to_the_end = isinstance(end, int) and end >= sys.maxsize  # as torch writes it
    return (slice(None),) * (dim % x.ndim) + (slice(start, None if to_the_end else end, step),)


@op("select")
def select(x: Any, dim: int, index: Size) -> Any:
    """One position of an axis."""
    return lax.index_in_dim(x, index, dim % x.ndim, keepdims=False)


@op("select_scatter")
def select_scatter(x: Any, source: Any, dim: int, index: Size) -> Any:
    """With one position of an axis replaced."""
    return x.at[(slice(None),) * (dim % x.ndim) + (index,)].set(cast(source, x.dtype))


@op("narrow")
def narrow(x: Any, dim: int, start: Size, length: Size) -> Any:
    """A part of an axis."""
    return take_slice(x, dim, start, start + length)


@op("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "tensor_split")
def split(x: Any, sizes: Any, dim: int = 0, *, out: Any) -> Any:
    """Parts of an axis."""
    avals = out if isinstance(out, tuple) else (out,)
    ends = itertools.accumulate(aval.shape[dim] for aval in avals)
    return tuple(take_slice(x, dim, e - a.shape[dim], e) for e, a in zip(ends, avals, strict=True))


@op("unbind")
def unbind(x: Any, dim: int = 0) -> Any:
    """Each position of an axis."""
    return tuple(select(x, dim, i) for i in range(x.shape[dim]))


@op("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0, *, out: Any) -> Any:
    """Joined along an axis; empty ones of one axis are left out."""
    given = [cast(x, out.dtype) for x in tensors if x.shape != (0,)]
    return jnp.concatenate(given, dim) if given else jnp.zeros(out.shape, out.dtype)


@op("stack")
def stack(tensors: Sequence[Any], dim: int = 0, *, out: Any) -> Any:
    """Joined along a new axis."""
    return jnp.stack([cast(x, out.dtype) for x in tensors], dim)


@op("repeat")
def repeat(x: Any, times: Sequence[Size]) -> Any:
    """Tiled."""
    return jnp.tile(x, times) if len(times) else x


@op("flip")
def flip(x: Any, dims: Sequence[int]) -> Any:
    """Axes reversed."""
    return jnp.flip(x, [d % x.ndim for d in dims]) if x.ndim and len(dims) else x


@op("roll")
def roll(x: Any, shifts: Any, dims: Any = ()) -> Any:
    """Moved round."""
    shifts = tuple(shifts) if not isinstance(shifts, int) else (shifts,)
    if not dims:
        return jnp.roll(x.ravel(), shifts[0]).reshape(x.shape)
    return jnp.roll(x, shifts, tuple(dims)) if x.ndim else x


@op("rot90")
def rot90(x: Any, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    """Turned by right angles."""
    return jnp.rot90(x, k, (dims[0], dims[1]))


@op("diagonal")
def diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """A diagonal of two axes."""
    return jnp.diagonal(x, offset, dim1, dim2)


@op("diagonal_scatter")
def diagonal_scatter(x: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """With a diagonal replaced."""
    places = np.diagonal(np.arange(x.size).reshape(x.shape), offset, dim1, dim2)
    return put(places, x.shape)(x, cast(source, x.dtype))


@op("diag_embed")
def diag_embed(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1, *, out: Any) -> Any:
    """A diagonal of a matrix that is zero elsewhere."""
    return diagonal_scatter(jnp.zeros(out.shape, x.dtype), x, offset, dim1, dim2)


def _places(size: Sequence[int], stride: Sequence[int], offset: int | None) -> np.ndarray:
    places = np.full(tuple(size), offset or 0)
    for axis, (n, s) in enumerate(zip(size, stride, strict=True)):
        places = places + (np.arange(n) * s).reshape([-1 if i == axis else 1 for i in range(len(size))])
    return places


@op("as_strided_scatter", "prims::as_strided_scatter")
def as_strided_scatter(
    x: Any, source: Any, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    """With positions of contiguous memory replaced."""
    return put(_places(size, stride, offset), x.shape)(x, cast(source, x.dtype))


@op("unfold")
def unfold(x: Any, dim: int, size: int, step: int) -> Any:
    """Windows of an axis, which have a new last axis."""
    if not x.ndim:
        return x.reshape(1)[:size]
    dim %= x.ndim
    starts = np.arange(0, x.shape[dim] - size + 1, step)
    taken = jnp.take(x, starts[:, None] + np.arange(size), axis=dim)
    return jnp.moveaxis(taken, dim + 1, -1)


@op("tril")
def tril(x: Any, diagonal: int = 0) -> Any:
    """Below a diagonal."""
    return jnp.tril(x, diagonal)


@op("triu")
def triu(x: Any, diagonal: int = 0) -> Any:
    """Above a diagonal."""
    return jnp.triu(x, diagonal)


@op("view_as_real", "view_as_real_copy")
def view_as_real(x: Any) -> Any:
    """Real and imaginary parts, in a last axis."""
    return jnp.stack([x.real, x.imag], -1)


@op("view_as_complex", "view_as_complex_copy")
def view_as_complex(x: Any) -> Any:
    """The complex numbers of these parts."""
    return lax.complex(x[..., 0], x[..., 1])


@op("view.dtype")
def view_dtype(x: Any, dtype: Any, *, out: Any) -> Any:
    """The same bits in another dtype."""
    ours, theirs = jnp.dtype(x.dtype).itemsize, jnp.dtype(out.dtype).itemsize
    if ours < theirs:
        x = x.reshape(*x.shape[:-1], -1, theirs // ours)
    return lax.bitcast_convert_type(x, out.dtype).reshape(out.shape)


@op("pixel_shuffle")
def pixel_shuffle(x: Any, factor: int, *, out: Any) -> Any:
    """Channels as pixels."""
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels // factor**2, factor, factor, height, width)
    n = len(lead)
    return jnp.transpose(x, [*range(n), n, n + 3, n + 1, n + 4, n + 2]).reshape(out.shape)


@op("pixel_unshuffle")
def pixel_unshuffle(x: Any, factor: int, *, out: Any) -> Any:
    """Pixels as channels."""
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels, height // factor, factor, width // factor, factor)
    n = len(lead)
    return jnp.transpose(x, [*range(n), n, n + 2, n + 4, n + 1, n + 3]).reshape(out.shape)


@op("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(x: Any, groups: int) -> Any:
    """Channels of groups, one of each in turn."""
    batch, channels, *rest = x.shape
    return jnp.swapaxes(x.reshape(batch, groups, channels // groups, *rest), 1, 2).reshape(x.shape)


@op("real")
def real(x: Any) -> Any:
    """The real part."""
    return jnp.real(x)


@op("imag")
def imag(x: Any) -> Any:
    """The imaginary part."""
    return jnp.imag(x)


@op("fill")
def fill(x: Any, value: Any, *, out: Any) -> Any:
    """One value everywhere."""
    return jnp.broadcast_to(cast(value, out.dtype), out.shape)


@op("zero")
def zero(x: Any, *, out: Any) -> Any:
    """Zero everywhere."""
    return jnp.zeros(out.shape, out.dtype)
