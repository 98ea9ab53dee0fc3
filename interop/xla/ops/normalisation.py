"""Normalisation. Half precision is computed in single; statistics that an op returns are constants, as in torch,
but those of groups."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..dtypes import cast, opmath
from ..table import Size, op
from .reductions import root, vector_norm


def _standardised(x: Any, axes: Sequence[int], eps: float) -> tuple[Any, Any, Any]:
    """Zero mean and unit variance over axes; the mean and the reciprocal deviation, with those axes."""
    axes = tuple(axes)
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    scale = lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)
    return centred * scale, mean, scale


def _affine(x: Any, weight: Any, bias: Any, shape: Sequence[Size]) -> Any:
    x = x if weight is None else x * weight.astype(x.dtype).reshape(shape)
    return x if bias is None else x + bias.astype(x.dtype).reshape(shape)


@op("native_layer_norm")
def layer_norm(x: Any, shape: Sequence[Size], weight: Any, bias: Any, eps: float) -> Any:
    """Over the last axes; the result, means and reciprocal deviations."""
    normed, mean, scale = _standardised(x.astype(opmath(x.dtype)), range(x.ndim - len(shape), x.ndim), eps)
    return _affine(normed, weight, bias, shape), *map(lax.stop_gradient, (mean, scale))


@op("_fused_rms_norm")
def rms_norm(x: Any, shape: Sequence[Size], weight: Any, eps: float | None) -> Any:
    """By the root of the mean square of the last axes."""
    wide = x.astype(opmath(x.dtype))
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    scale = lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + (jnp.finfo(x.dtype).eps if eps is None else eps))
    return _affine(wide * scale, weight, None, shape), scale


@op("native_group_norm")
def group_norm(x: Any, weight: Any, bias: Any, n: Size, channels: int, size: Size, groups: int, eps: float) -> Any:
    """Over groups of channels."""
    wide = x.astype(opmath(x.dtype)).reshape(n, groups, channels // groups * size)
    normed, mean, scale = _standardised(wide, (2,), eps)
    normed = _affine(normed.reshape(x.shape), weight, bias, (1, channels, *(1,) * (x.ndim - 2)))
    return normed, *(s.reshape(n, groups) for s in (mean, scale))


@op("native_batch_norm", "_native_batch_norm_legit.default", updates=True)
def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, *, out: Any
) -> Any:
    """Over all axes but that of channels; in training with new running statistics, if there are any."""
    shape = (1, -1, *(1,) * (x.ndim - 2))
    wide = x.astype(opmath(x.dtype))
    if not training:
        scale = lax.rsqrt(var.astype(wide.dtype) + eps)
        normed = (wide - mean.astype(wide.dtype).reshape(shape)) * scale.reshape(shape)
        empty = (jnp.zeros(aval.shape, aval.dtype) for aval in out[1:3])
        unchanged = (mean, var) if len(out) > 3 else ()
        return _affine(normed, weight, bias, shape), *empty, *unchanged
    axes = (0, *range(2, x.ndim))
    normed, own_mean, scale = _standardised(wide, axes, eps)
    own_mean, scale = (lax.stop_gradient(s.ravel()) for s in (own_mean, scale))
    results = [_affine(normed, weight, bias, shape), own_mean, scale]
    if len(out) > 3:
        count = math.prod(x.shape[axis] for axis in axes)
        own_var = lax.stop_gradient(jnp.var(wide, axes)) * (count / max(count - 1, 1))
        results += [(1 - momentum) * old + momentum * new for old, new in ((mean, own_mean), (var, own_var))]
    return tuple(results)


@op("_native_batch_norm_legit.no_stats")
def batch_norm_without_statistics(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float, *, out: Any
) -> Any:
    """The same without running statistics."""
    return batch_norm(x, weight, bias, None, None, True, momentum, eps, out=out)


@op("_native_batch_norm_legit_no_training")
def batch_norm_in_evaluation(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float, *, out: Any
) -> Any:
    """The same by running statistics."""
    return batch_norm(x, weight, bias, mean, var, False, momentum, eps, out=out)


@op("_batch_norm_with_update", updates=True)
def batch_norm_with_update(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float, *, out: Any
) -> Any:
    """The same in training, with a place for what torch's kernels keep beside."""
    *results, new_mean, new_var = batch_norm(x, weight, bias, mean, var, True, momentum, eps, out=out)
    return *results, jnp.zeros(out[3].shape, out[3].dtype), new_mean, new_var


@op("_weight_norm_interface")
def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    """Directions with lengths of their own, and the norms of what was given."""
    axes = tuple(i for i in range(v.ndim) if i != dim)
    norms = root(jnp.sum(v * v, axes, keepdims=True))
    return v * (g / norms), norms


@op("renorm")
def renorm(x: Any, p: float, dim: int, maxnorm: float, *, out: Any) -> Any:
    """Slices of an axis made no longer than a bound."""
    axes = [i for i in range(x.ndim) if i != dim % x.ndim]
    return x * cast(_shrinking(vector_norm(x, p, axes, True, out=out), maxnorm), out.dtype)


@op("embedding_renorm")
def embedding_renorm(weight: Any, rows: Any, maxnorm: float, p: float, *, out: Any) -> Any:
    """The rows that are looked up made no longer than a bound."""
    is_used = jnp.zeros((weight.shape[0], 1), bool).at[rows.ravel()].set(True)
    scale = _shrinking(vector_norm(weight, p, [1], True, out=out), maxnorm)
    return weight * cast(jnp.where(is_used, scale, 1), out.dtype)


def _shrinking(norms: Any, most: float) -> Any:
    return jnp.where(norms > most, most / (norms + 1e-7), 1)
