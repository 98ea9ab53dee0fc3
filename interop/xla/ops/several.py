"""Functions of several numbers each, and those that have options."""

import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.special as special
from jax import lax

from ..dtypes import Number, cast, category, is_array, opmath
from ..table import op
from .elementwise import HALVES, computing_dtype, round_half_to_even


@op("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(condition: Any, x: Any, y: Any, *, out: Any) -> Any:
    """`x` where the condition holds, else `y`."""
    return jnp.where(condition, cast(x, out.dtype), cast(y, out.dtype))


@op("clamp", "clip")
def clamp(x: Any, low: Any = None, high: Any = None, *, out: Any) -> Any:
    """Within bounds; on them, the derivative is that of `x`, or as torch has it from 2.14 on."""
    dtype = computing_dtype(out, *(a for a in (x, low, high) if a is not None))
    by_arrays = is_array(low) or is_array(high)
    x, low, high = (None if a is None else cast(a, dtype) for a in (x, low, high))
    if HALVES and by_arrays:
        return _halved_on_bounds(x, low, high)
    below, above = (operator.le, operator.ge) if HALVES else (operator.lt, operator.gt)  # a number has no derivative
    return _clamped(x, low, high, below, above)


def _clamped(x: Any, low: Any, high: Any, below: Callable[..., Any], above: Callable[..., Any]) -> Any:
    if low is not None:
        x = jnp.where(below(x, low) | jnp.isnan(low), low, x)
    return x if high is None else jnp.where(above(x, high) | jnp.isnan(high), high, x)


def _halved_on_bounds(x: Any, low: Any, high: Any) -> Any:
    """On a bound, `x` and the bound have half of the derivative each; where bounds are equal, one has all of it."""
    y = x if low is None else jnp.maximum(x, low)
    y = y if high is None else jnp.minimum(y, high)
    if low is None or high is None:
        return y
    one = jnp.where(x < low, low, jnp.where(x > high, high, x))
    return jnp.where(low == high, one, y)


@op("clamp_min")
def clamp_min(x: Any, low: Any, *, out: Any) -> Any:
    """Not below a bound."""
    return clamp(x, low, None, out=out)


@op("clamp_max")
def clamp_max(x: Any, high: Any, *, out: Any) -> Any:
    """Not above a bound."""
    return clamp(x, None, high, out=out)


@op("addcmul")
def addcmul(x: Any, a: Any, b: Any, *, value: Number = 1, out: Any) -> Any:
    """`x + value * a * b`."""
    x, a, b = (cast(y, computing_dtype(out, x, a, b)) for y in (x, a, b))
    return x + (a * b if value == 1 else value * a * b)


@op("addcdiv")
def addcdiv(x: Any, a: Any, b: Any, *, value: Number = 1, out: Any) -> Any:
    """`x + value * a / b`."""
    x, a, b = (cast(y, computing_dtype(out, x, a, b)) for y in (x, a, b))
    return x + value * (a / b)


@op("lerp")
def lerp(x: Any, end: Any, weight: Any, *, out: Any) -> Any:
    """Between two, by a weight."""
    dtype = computing_dtype(out, x, end)
    x, end, weight = cast(x, dtype), cast(end, dtype), cast(weight, dtype)
    near = jnp.abs(weight) < 0.5
    return jnp.where(near, x + weight * (end - x), end - (end - x) * (1 - weight))


@op("nan_to_num")
def nan_to_num(
    x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None, *, out: Any
) -> Any:
    """Numbers in the place of what is none; they have no derivative."""
    if category(x.dtype) < 2:
        return x
    limits = jnp.finfo(out.dtype)
    high, low = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf

    def real(x: Any) -> Any:
        x = jnp.where(jnp.isnan(x), 0.0 if nan is None else nan, x)
        return jnp.where(x == jnp.inf, high, jnp.where(x == -jnp.inf, low, x))

    return lax.complex(real(x.real), real(x.imag)) if category(x.dtype) == 3 else real(x)


@op("round.decimals")
def round_decimals(x: Any, *, decimals: int, out: Any) -> Any:
    """To a number of decimals."""
    scale = 10.0 ** abs(decimals)
    x = cast(x, opmath(out.dtype))
    return round_half_to_even(x * scale) / scale if decimals >= 0 else round_half_to_even(x / scale) * scale


@op("logit")
def logit(x: Any, eps: float | None = None, *, out: Any) -> Any:
    """The inverse of the sigmoid; of numbers within `eps` of the bounds, the derivative is zero."""
    x = cast(x, opmath(out.dtype))
    x = x if eps is None else clamp(x, eps, 1 - eps, out=out)
    return jnp.log(x / (1 - x))


@op("mvlgamma")
def mvlgamma(x: Any, p: int, *, out: Any) -> Any:
    """The multivariate log-gamma function."""
    return special.multigammaln(cast(x, opmath(out.dtype)), p)


@op("special_ndtr")
def ndtr(x: Any, *, out: Any) -> Any:
    """The distribution function of the normal distribution."""
    return special.ndtr(cast(x, opmath(out.dtype)))


@op("special_erfcx")
def erfcx(x: Any, *, out: Any) -> Any:
    """`exp(x**2) * erfc(x)`."""
    x = cast(x, opmath(out.dtype))
    return 2 * jnp.exp(special.log_ndtr(-x * jnp.sqrt(2.0).astype(x.dtype)) + x * x)


@op("complex")
def make_complex(real: Any, imag: Any, *, out: Any) -> Any:
    """A complex number of its parts."""
    part = jnp.float64 if out.dtype == jnp.complex128 else jnp.float32
    return lax.complex(*jnp.broadcast_arrays(cast(real, part), cast(imag, part)))


@op("polar")
def polar(size: Any, angle: Any, *, out: Any) -> Any:
    """A complex number of its size and angle."""
    return make_complex(size * jnp.cos(angle), size * jnp.sin(angle), out=out)


@op("frexp")
def frexp(x: Any, *, out: Any) -> Any:
    """Mantissa and exponent."""
    mantissa, exponent = jnp.frexp(cast(x, opmath(out[0].dtype)))
    return mantissa, exponent
