"""Arithmetic, comparisons, logic and bits of two numbers each."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
from jax import lax

from ..dtypes import Number, cast, category, is_array
from ..promotion import promoting
from ..table import op
from .elementwise import HALVES, computing_dtype, pointwise


@pointwise("add")
def add(x: Any, y: Any, alpha: Number = 1) -> Any:
    """`x + alpha * y`; logical or of bools."""
    return x + y if alpha == 1 else x + alpha * y if x.dtype != jnp.bool_ else x | (y & bool(alpha))


@pointwise("sub", "subtract")
def sub(x: Any, y: Any, alpha: Number = 1) -> Any:
    """`x - alpha * y`."""
    return x - y if alpha == 1 else x - alpha * y


@pointwise("rsub")
def rsub(x: Any, y: Any, alpha: Number = 1) -> Any:
    """`y - alpha * x`."""
    return y - x if alpha == 1 else y - alpha * x


@pointwise("mul")
def mul(x: Any, y: Any) -> Any:
    """The product; logical and of bools."""
    return x * y


def _floor_divide(x: Any, y: Any) -> Any:
    if category(x.dtype) == 1:
        return jnp.floor_divide(x, y)
    remainder = lax.rem(*jnp.broadcast_arrays(x, y))
    quotient = (x - remainder) / y
    quotient = jnp.where((remainder != 0) & ((y < 0) != (remainder < 0)), quotient - 1, quotient)
    rounded = jnp.floor(quotient)
    rounded = jnp.where(quotient - rounded > 0.5, rounded + 1, rounded)
    return lax.stop_gradient(jnp.where(y == 0, x / y, jnp.where(quotient == 0, 0 * (x / y), rounded)))


def _trunc_divide(x: Any, y: Any) -> Any:
    return lax.div(*jnp.broadcast_arrays(x, y)) if category(x.dtype) == 1 else lax.stop_gradient(jnp.trunc(x / y))


@pointwise("div.Tensor", "div.Scalar", "true_divide", "div.Tensor_mode", "div.Scalar_mode")
def div(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    """Division, as real numbers, towards zero or downwards."""
    match rounding_mode:
        case None:
            return x / y
        case "floor":
            return _floor_divide(x, y)
        case _:
            return _trunc_divide(x, y)


pointwise("floor_divide")(lambda x, y: _floor_divide(x, y))


@pointwise("remainder")
def remainder(x: Any, y: Any) -> Any:
    """What is left of division downwards; it has the sign of `y`."""
    if category(x.dtype) == 1:
        return jnp.remainder(x, y)
    rest = lax.rem(*jnp.broadcast_arrays(x, y))
    return jnp.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@pointwise("fmod")
def fmod(x: Any, y: Any) -> Any:
    """What is left of division towards zero; it has the sign of `x`."""
    return lax.rem(*jnp.broadcast_arrays(x, y))


@op("pow", "float_power")
def power(x: Any, y: Any, *, out: Any) -> Any:
    """`x ** y`; integer powers are products."""
    dtype = computing_dtype(out, x, y)
    if is_array(x) and isinstance(y, Number) and not isinstance(y, bool):
        return _power_of_number(cast(x, dtype), y)
    x, y = cast(x, dtype), cast(y, dtype)
    if category(dtype) == 1:
        return _integer_power(x, y)
    return _power(x, y)


def _power_of_number(x: Any, y: Any) -> Any:
    if y == 0:
        return jnp.ones_like(x)
    if y == 0.5:
        return jnp.sqrt(x)
    if y == -0.5 and category(x.dtype) == 2:
        return lax.rsqrt(x)
    if isinstance(y, int) or (isinstance(y, float) and y.is_integer() and abs(y) < 64):
        return lax.integer_pow(x, int(y)) if abs(y) < 64 or category(x.dtype) == 1 else _power(x, cast(y, x.dtype))
    return _power(x, cast(y, x.dtype))


def _integer_power(x: Any, y: Any) -> Any:
    safe = jnp.where(y < 0, 0, y)
    return jnp.where(y < 0, jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0)), jnp.power(x, safe))


@jax.custom_jvp
def _power(x: Any, y: Any) -> Any:
    return jnp.power(x, y)


def _power_jvp(primals: Any, tangents: Any) -> Any:
    """torch's formulas: by the base zero where the exponent is, by the exponent zero where the base is."""
    (x, y), (dx, dy) = primals, tangents
    result, tangent = _power(x, y), jnp.zeros_like(x * y)
    by_base = jnp.where(y == 0, 0, y * _power(x, jnp.where(y == 0, 1, y - 1)))
    is_zero = (x == 0) & ((y >= 0) if category(y.dtype) < 3 else (y.real >= 0))
    by_exponent = jnp.where(is_zero, 0, result * jnp.log(jnp.where(is_zero, 1, x)))
    for slope, given in ((by_base, dx), (by_exponent, dy)):
        if not isinstance(given, jax.custom_derivatives.SymbolicZero):  # whose product with infinity would be NaN
            tangent = tangent + slope * given
    return result, tangent


_power.defjvp(promoting(_power_jvp), symbolic_zeros=True)


@pointwise("atan2", "arctan2")
def atan2(y: Any, x: Any) -> Any:
    """The angle of a point; its derivative at the origin is zero."""
    origin = (x == 0) & (y == 0)
    return jnp.where(origin, lax.stop_gradient(jnp.arctan2(y, x)), jnp.arctan2(y, jnp.where(origin, 1, x)))


@pointwise("hypot")
def hypot(x: Any, y: Any) -> Any:
    """The length of a hypotenuse."""
    return jnp.hypot(x, y)


@pointwise("maximum", "max.other")
def maximum(x: Any, y: Any) -> Any:
    """The larger one, NaN if one is; a derivative goes to equal ones by halves."""
    return jnp.maximum(x, y)


@pointwise("minimum", "min.other")
def minimum(x: Any, y: Any) -> Any:
    """The smaller one, NaN if one is."""
    return jnp.minimum(x, y)


@pointwise("fmax")
def fmax(x: Any, y: Any) -> Any:
    """The larger one that is not NaN; of equal ones the first has the derivative, or each a half."""
    larger = jnp.where((x >= y) | jnp.isnan(y), x, y)
    return jnp.where(x == y, jnp.maximum(x, y), larger) if HALVES else larger


@pointwise("fmin")
def fmin(x: Any, y: Any) -> Any:
    """The smaller one that is not NaN; derivatives as for `fmax`."""
    smaller = jnp.where((x <= y) | jnp.isnan(y), x, y)
    return jnp.where(x == y, jnp.minimum(x, y), smaller) if HALVES else smaller


@pointwise("copysign")
def copysign(x: Any, y: Any) -> Any:
    """The size of `x` with the sign of `y`; at zero it has no derivative."""
    sign = lax.stop_gradient(jnp.where(jnp.signbit(x) == jnp.signbit(y), 1, -1).astype(x.dtype))
    return jnp.where(x == 0, lax.stop_gradient(jnp.copysign(x, y)), x * sign)


@pointwise("ldexp")
def ldexp(x: Any, y: Any) -> Any:
    """`x * 2**y`."""
    return x * jnp.exp2(y)


@pointwise("xlogy", "special_xlogy")
def xlogy(x: Any, y: Any) -> Any:
    """`x * log(y)`, zero where `x` is."""
    zero = (x == 0) & ~jnp.isnan(y)
    return jnp.where(zero, x * jnp.log(jnp.where(y > 0, y, 1)), x * jnp.log(jnp.where(zero, 1, y)))


@pointwise("special_xlog1py")
def xlog1py(x: Any, y: Any) -> Any:
    """`x * log(1 + y)`, zero where `x` is."""
    zero = (x == 0) & ~jnp.isnan(y)
    return jnp.where(zero, x * jnp.log1p(jnp.where(y > -1, y, 0)), x * jnp.log1p(jnp.where(zero, 0, y)))


@pointwise("logaddexp")
def logaddexp(x: Any, y: Any) -> Any:
    """`log(exp(x) + exp(y))`."""
    return jnp.logaddexp(x, y)


@pointwise("logaddexp2")
def logaddexp2(x: Any, y: Any) -> Any:
    """The same to the base of two."""
    return jnp.logaddexp2(x, y)


@pointwise("heaviside")
def heaviside(x: Any, y: Any) -> Any:
    """A step, with `y` at zero."""
    return jnp.where(x == 0, y, jnp.where(x < 0, 0, 1).astype(x.dtype))


@pointwise("gcd")
def gcd(x: Any, y: Any) -> Any:
    """The greatest common divisor."""
    return jnp.gcd(x, y)


@pointwise("lcm")
def lcm(x: Any, y: Any) -> Any:
    """The least common multiple."""
    return jnp.lcm(x, y)


@pointwise("igamma", "special_gammainc")
def igamma(a: Any, x: Any) -> Any:
    """The lower incomplete gamma function."""
    return special.gammainc(a, x)


@pointwise("igammac", "special_gammaincc")
def igammac(a: Any, x: Any) -> Any:
    """The upper incomplete gamma function."""
    return special.gammaincc(a, x)


@pointwise("special_zeta")
def zeta(x: Any, y: Any) -> Any:
    """The Hurwitz zeta function."""
    return special.zeta(x, y)


for _name, _compare in {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "__and__": jnp.bitwise_and,
    "__or__": jnp.bitwise_or,
    "__xor__": jnp.bitwise_xor,
}.items():
    pointwise(_name)(lambda x, y, _compare=_compare: _compare(x, y))

for _name, _logic in {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}.items():
    pointwise(_name)(lambda x, y, _logic=_logic: _logic(x != 0, y != 0))


@pointwise("bitwise_left_shift", "__lshift__")
def left_shift(x: Any, y: Any) -> Any:
    """Bits moved left; none is left of as many as there are."""
    bits = 8 * x.dtype.itemsize
    return jnp.where((y < 0) | (y >= bits), 0, lax.shift_left(*jnp.broadcast_arrays(x, y.clip(0, bits - 1))))


@pointwise("bitwise_right_shift", "__rshift__")
def right_shift(x: Any, y: Any) -> Any:
    """Bits moved right, the sign kept."""
    last = 8 * x.dtype.itemsize - 1
    return jnp.right_shift(x, jnp.where((y < 0) | (y > last), last, y))
