"""Convolutions, and transposed ones, of any number of axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dtypes import opmath
from ..table import op


def _each(value: Any, n: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * n if len(value) == 1 else value


@op("convolution", "convolution_overrideable", "_convolution")
def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *flags: bool,
) -> Any:
    """`torch.nn.functional.conv*d` and `conv_transpose*d`; one image or a batch."""
    n = weight.ndim - 2
    stride, padding, dilation, extra = (_each(v, n) for v in (stride, padding, dilation, output_padding))
    is_single = x.ndim == n + 1
    x = x[None] if is_single else x
    spread = (1,) * n
    widths = [(p, p) for p in padding]
    if transposed:
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        widths = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        stride, spread, weight = spread, stride, _turned(weight, groups)
    axes = "".join("DHWXYZ"[i] for i in range(n))
    result = lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        stride,
        widths,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        dimension_numbers=(f"NC{axes}", f"OI{axes}", f"NC{axes}"),
        feature_group_count=groups,
        preferred_element_type=opmath(x.dtype),
    )
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * n)
    return result[0] if is_single else result


def _turned(weight: Any, groups: int) -> Any:
    """The weight of the convolution that a transposed one is: channels exchanged, axes reversed."""
    n_in, n_out, *kernel = weight.shape
    weight = weight.reshape(groups, n_in // groups, n_out, *kernel)
    weight = jnp.swapaxes(weight, 1, 2).reshape(groups * n_out, n_in // groups, *kernel)
    return jnp.flip(weight, tuple(range(2, weight.ndim)))


@op("convolution_backward")
def convolution_backward(cotangent: Any, x: Any, weight: Any, bias_sizes: Any, *options: Any) -> Any:
    """The gradients by what a mask names, for callables that take gradients themselves."""
    *geometry, mask = options
    _, pullback = jax.vjp(lambda x, w: convolution(x, w, None, *geometry).astype(cotangent.dtype), x, weight)
    by_x, by_weight = pullback(cotangent)
    others = tuple(i for i in range(cotangent.ndim) if i != 1)
    by_bias = jnp.sum(cotangent, others) if mask[2] else None
    return by_x if mask[0] else None, by_weight if mask[1] else None, by_bias
