"""Activations. At their kinks they have the derivative that torch gives them."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
from jax import lax

from ..dtypes import Number, cast, opmath
from ..promotion import promoting
from ..table import op


def _wide(x: Any, out: Any) -> Any:
    return cast(x, opmath(out.dtype))


@jax.custom_jvp
def _relu(x: Any) -> Any:
    return jnp.maximum(x, 0)


@_relu.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return _relu(*primals), jnp.where(primals[0] <= 0, 0, tangents[0])


@op("relu")
def relu(x: Any) -> Any:
    """Its derivative at zero is zero, and NaN stays what it is.

    A maximum, unlike a selection, lets XLA keep the order of axes that convolutions want.
    """
    return _relu(x)


@op("hardtanh", "relu6")
def hardtanh(x: Any, low: Number = -1.0, high: Number = 1.0, *, out: Any) -> Any:
    """Within bounds, on which its derivative is zero."""
    x = _wide(x, out)
    return jnp.where((x > low) & (x < high), x, lax.stop_gradient(jnp.clip(x, cast(low, x.dtype), cast(high, x.dtype))))


@op("leaky_relu")
def leaky_relu(x: Any, slope: Number = 0.01, *, out: Any) -> Any:
    """At zero the slope is the negative side's."""
    x = _wide(x, out)
    return jnp.where(x > 0, x, x * slope)


@op("prelu", "_prelu_kernel")
def prelu(x: Any, weight: Any, *, out: Any) -> Any:
    """A leaky ReLU with slopes of its own."""
    x = _wide(x, out)
    return jnp.where(x > 0, x, x * weight)


@op("rrelu_with_noise", "rrelu_with_noise_functional")
def rrelu(
    x: Any,
    noise: Any,
    lower: Number = 0.125,
    upper: Number = 1 / 3,
    training: bool = False,
    generator: Any = None,
    *,
    out: Any,
    key: Any,
) -> Any:
    """A leaky ReLU with random slopes in training, and the noise that they make."""
    outs = out if isinstance(out, tuple) else (out,)
    x = _wide(x, outs[0])
    if not training:
        result = jnp.where(x > 0, x, x * (lower + upper) / 2)
        return (result, noise)[: len(outs)]
    slopes = jnp.where(x <= 0, jax.random.uniform(key, x.shape, x.dtype, lower, upper), 1)
    return (x * slopes, slopes)[: len(outs)]


@op("elu")
def elu(x: Any, alpha: Number = 1.0, scale: Number = 1.0, input_scale: Number = 1.0, *, out: Any) -> Any:
    """Exponential on the negative side, whose derivative it has at zero."""
    x = _wide(x, out)
    negative = jnp.where(x > 0, 0, x)
    return jnp.where(x > 0, x * scale, jnp.expm1(negative * input_scale) * alpha * scale)


@op("celu")
def celu(x: Any, alpha: Number = 1.0, *, out: Any) -> Any:
    """The same, of one slope."""
    return elu(x, alpha, 1.0, 1 / alpha, out=out)


@op("gelu")
def gelu(x: Any, *, approximate: str = "none", out: Any) -> Any:
    """By the error function, or by tanh."""
    x = _wide(x, out)
    if approximate == "tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + jnp.tanh(inner))
    return 0.5 * x * (1 + special.erf(x * 0.7071067811865476))


@op("silu")
def silu(x: Any, *, out: Any) -> Any:
    """`x * sigmoid(x)`."""
    x = _wide(x, out)
    return x * jax.nn.sigmoid(x)


@op("mish")
def mish(x: Any, *, out: Any) -> Any:
    """`x * tanh(softplus(x))`."""
    x = _wide(x, out)
    return x * jnp.tanh(jnp.logaddexp(x, 0.0))


@op("softplus")
def softplus(x: Any, beta: Number = 1, threshold: Number = 20, *, out: Any) -> Any:
    """A smooth ReLU; linear above a threshold."""
    x = _wide(x, out)
    is_linear = x * beta > threshold
    return jnp.where(is_linear, x, jnp.log1p(jnp.exp(jnp.where(is_linear, 0, x * beta))) / beta)


@op("log_sigmoid_forward")
def log_sigmoid(x: Any, *, out: Any) -> Any:
    """The logarithm of the sigmoid, and a buffer that its derivative in torch takes."""
    wide = cast(x, opmath(out[0].dtype))
    smaller = jnp.where(wide < 0, wide, 0)
    return smaller - jnp.log1p(jnp.exp(-jnp.abs(wide))), jnp.zeros(out[1].shape, out[1].dtype)


@op("hardsigmoid")
def hardsigmoid(x: Any, *, out: Any) -> Any:
    """Its derivative is zero on the bounds."""
    x = _wide(x, out)
    return jnp.where((x > -3) & (x < 3), x / 6 + 0.5, lax.stop_gradient(jnp.clip(x / 6 + 0.5, 0, 1)))


@op("hardswish")
def hardswish(x: Any, *, out: Any) -> Any:
    """`x * hardsigmoid(x)`."""
    x = _wide(x, out)
    return jnp.where(x <= -3, 0 * x, jnp.where(x < 3, x * (x + 3) / 6, x))


@op("hardshrink")
def hardshrink(x: Any, lambd: Number = 0.5) -> Any:
    """Zero within bounds, and on them."""
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


@op("softshrink")
def softshrink(x: Any, lambd: Number = 0.5) -> Any:
    """Towards zero by a constant."""
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0 * x))


@op("threshold")
def threshold(x: Any, bound: Number, value: Number) -> Any:
    """`value` up to a bound, and on it."""
    return jnp.where(x <= bound, jnp.asarray(value, x.dtype), x)


@op("glu")
def glu(x: Any, dim: int = -1, *, out: Any) -> Any:
    """One half of an axis, gated by the other."""
    a, b = jnp.split(_wide(x, out), 2, axis=dim)
    return a * jax.nn.sigmoid(b)


@op("_safe_softmax")
def safe_softmax(x: Any, dim: int, dtype: Any = None, *, out: Any) -> Any:
    """The softmax, zero where all is minus infinity."""
    x = _wide(x, out)
    empty = jnp.all(x == -jnp.inf, axis=dim, keepdims=True)
    return jnp.where(empty, 0, jax.nn.softmax(jnp.where(empty, 0, x), axis=dim))


@op("softmax", "_softmax")
def softmax(x: Any, dim: int, rest: Any = None, *, dtype: Any = None, out: Any) -> Any:
    """Along an axis; NaN where all is minus infinity."""
    x = _wide(x, out)
    return jax.nn.softmax(x, axis=dim) if x.ndim else jnp.ones_like(x) * (x * 0 + 1)


@op("log_softmax", "_log_softmax")
def log_softmax(x: Any, dim: int, rest: Any = None, *, dtype: Any = None, out: Any) -> Any:
    """The logarithm of the softmax."""
    x = _wide(x, out)
    return jax.nn.log_softmax(x, axis=dim) if x.ndim else x - x
