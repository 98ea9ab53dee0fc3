"""Losses that torch has as one op; the others come as their parts."""

from typing import Any

import jax.numpy as jnp

from ..dtypes import cast, opmath
from ..table import op
from .elementwise import absolute


def reduced(x: Any, reduction: int) -> Any:
    """Each, their mean or their sum."""
    return (lambda x: x, jnp.mean, jnp.sum)[reduction](x)


def _wide(out: Any, *tensors: Any) -> list[Any]:
    out = out[0] if isinstance(out, tuple) else out
    return [cast(x, opmath(out.dtype)) for x in tensors]


@op("mse_loss")
def mse_loss(x: Any, y: Any, reduction: int = 1, *, out: Any) -> Any:
    """Squares of differences."""
    x, y = _wide(out, x, y)
    return reduced((x - y) * (x - y), reduction)


@op("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(x: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> Any:
    """The negative log-likelihood of classes, and the sum of their weights; classes are the second axis."""
    axis = 1 if x.ndim > 1 else 0
    wide, counted = x.astype(opmath(x.dtype)), target != ignore_index
    classes = jnp.where(counted, target, 0)
    each = -jnp.squeeze(jnp.take_along_axis(wide, jnp.expand_dims(classes, axis), axis), axis)
    weights = jnp.ones((), wide.dtype) if weight is None else weight.astype(wide.dtype)[classes]
    weights = jnp.where(counted, weights, 0)
    each = jnp.where(counted, each * weights, 0)
    total = jnp.sum(jnp.broadcast_to(weights, each.shape))
    if reduction == 0:
        return each, jnp.zeros((), wide.dtype)
    return jnp.sum(each) / total if reduction == 1 else jnp.sum(each), total


@op("binary_cross_entropy")
def binary_cross_entropy(x: Any, y: Any, weight: Any = None, reduction: int = 1, *, out: Any) -> Any:
    """Of probabilities; logarithms are not below -100, where the derivative is torch's."""
    x, y = _wide(out, x, y)
    low = jnp.asarray(-100, x.dtype)
    each = (y - 1) * jnp.maximum(jnp.log1p(-x), low) - y * jnp.maximum(jnp.log(x), low)
    return reduced(each if weight is None else each * weight, reduction)


@op("smooth_l1_loss")
def smooth_l1_loss(x: Any, y: Any, reduction: int = 1, beta: float = 1.0, *, out: Any) -> Any:
    """Squares near zero, absolute values elsewhere."""
    x, y = _wide(out, x, y)
    size = absolute(x - y)
    if beta == 0:
        return reduced(size, reduction)
    near = size < beta
    return reduced(jnp.where(near, 0.5 * (x - y) * (x - y) / beta, size - 0.5 * beta), reduction)


@op("huber_loss")
def huber_loss(x: Any, y: Any, reduction: int = 1, delta: float = 1.0, *, out: Any) -> Any:
    """Squares near zero, absolute values elsewhere."""
    x, y = _wide(out, x, y)
    size = absolute(x - y)
    near = size <= delta
    return reduced(jnp.where(near, 0.5 * (x - y) * (x - y), delta * (size - 0.5 * delta)), reduction)


@op("soft_margin_loss")
def soft_margin_loss(x: Any, y: Any, reduction: int = 1, *, out: Any) -> Any:
    """`log(1 + exp(-x y))`."""
    x, y = _wide(out, x, y)
    return reduced(jnp.log1p(jnp.exp(-x * y)), reduction)


@op("multi_margin_loss")
def multi_margin_loss(
    x: Any,
    target: Any,
    p: float | int = 1,
    margin: float | int = 1,
    weight: Any = None,
    reduction: int = 1,
    *,
    out: Any,
) -> Any:
    """How far each class comes near the right one."""
    rows, classes = jnp.atleast_2d(x), jnp.atleast_1d(target)
    right = jnp.take_along_axis(rows, classes[:, None], 1)
    gap = margin - right + rows
    loss = jnp.where(gap > 0, gap, 0) ** int(p)
    loss = loss if weight is None else loss * weight[classes][:, None]
    is_right = classes[:, None] == jnp.arange(rows.shape[1])
    return reduced(jnp.sum(jnp.where(is_right, 0, loss), 1) / rows.shape[1], reduction).reshape(out.shape)
