"""Functions of one number each.

All operands of an op are brought to one dtype first, torch's promotion of theirs; half precision is computed in single.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import torch
from jax import lax

from ..dtypes import Number, cast, category, is_array, opmath, result_type
from ..promotion import promoting
from ..table import op
from .gamma import digamma, lgamma

HALVES = torch.__version__ >= "2.14"
"""Whether torch shares derivatives out where numbers are equal: of `fmax` and `fmin`, and on bounds."""


def computing_dtype(out: Any, *args: Any) -> Any:
    """The dtype that an elementwise op computes in."""
    out = out[0] if isinstance(out, tuple) else out
    common = result_type(*args)
    if category(out.dtype) >= 2 and category(common) < 3:
        common = jnp.promote_types(out.dtype, common) if category(common) == 2 else out.dtype
    return opmath(common)


def pointwise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of numbers of one dtype; keywords are passed as they are."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @op(*names)
        def run(*args: Any, out: Any, **kwargs: Any) -> Any:
            dtype = computing_dtype(out, *args)
            return function(*(_brought(x, dtype) for x in args), **kwargs)

        return run

    return register


def _brought(x: Any, dtype: Any) -> Any:
    return cast(x, dtype) if is_array(x) or isinstance(x, Number) else x


@op("nextafter")
def nextafter(x: Any, y: Any, *, out: Any) -> Any:
    """The next number towards another one, with the derivative of the first."""
    return _nextafter(*jnp.broadcast_arrays(cast(x, out.dtype), cast(y, out.dtype)))


@jax.custom_jvp
def _nextafter(x: Any, y: Any) -> Any:
    return jnp.nextafter(x, y)


@_nextafter.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return _nextafter(*primals), tangents[0]


def _register(table: dict[str, Callable[..., Any]]) -> None:
    for name, function in table.items():
        register_unary(name, function)


def register_unary(name: str, function: Callable[..., Any]) -> None:
    """A function of one array, in the dtype of the result."""

    @op(name)
    def run(x: Any, *, out: Any) -> Any:
        return function(cast(x, computing_dtype(out, x)))


def _sign(x: Any) -> Any:
    return jnp.where(jnp.isnan(x), 0, jnp.sign(x)) if category(x.dtype) == 2 else jnp.sign(x)


def _sgn(x: Any) -> Any:
    if category(x.dtype) < 3:
        return _sign(x)
    size = jnp.abs(x)
    return jnp.where(size == 0, 0, x / jnp.where(size == 0, 1, size))


@jax.custom_jvp
def _abs_complex(x: Any) -> Any:
    return lax.abs(x)


@_abs_complex.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    direction = _sgn(x)
    return _abs_complex(x), (direction.real * t.real + direction.imag * t.imag).astype(t.real.dtype)


@jax.custom_jvp
def _abs_real(x: Any) -> Any:
    return lax.abs(x)


@_abs_real.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return lax.abs(primals[0]), tangents[0] * jnp.sign(primals[0])


def absolute(x: Any) -> Any:
    """The absolute value, whose derivative at zero is zero."""
    if category(x.dtype) == 3:
        return _abs_complex(x)
    return _abs_real(x) if category(x.dtype) == 2 else jnp.abs(x)


def _angle(x: Any) -> Any:
    if category(x.dtype) == 3:
        zero = x == 0
        safe = jnp.where(zero, 1, x)
        return jnp.where(zero, 0, jnp.arctan2(safe.imag, safe.real))
    return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.pi, 0))


def _erfinv(x: Any) -> Any:
    return special.erfinv(x)


def round_half_to_even(x: Any) -> Any:
    """To the nearest integer, of two the even one."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN) if category(x.dtype) == 2 else x


def _reciprocal(x: Any) -> Any:
    return 1 / x


_register(
    {
        "abs": absolute,
        "neg": lambda x: -x,
        "exp": jnp.exp,
        "exp2": jnp.exp2,
        "expm1": jnp.expm1,
        "log": jnp.log,
        "log2": jnp.log2,
        "log10": jnp.log10,
        "log1p": jnp.log1p,
        "sqrt": jnp.sqrt,
        "rsqrt": lambda x: 1 / jnp.sqrt(x) if category(x.dtype) == 3 else lax.rsqrt(x),
        "sin": jnp.sin,
        "cos": jnp.cos,
        "tan": jnp.tan,
        "asin": jnp.arcsin,
        "acos": jnp.arccos,
        "atan": jnp.arctan,
        "sinh": jnp.sinh,
        "cosh": jnp.cosh,
        "tanh": jnp.tanh,
        "asinh": jnp.arcsinh,
        "acosh": jnp.arccosh,
        "atanh": jnp.arctanh,
        "sinc": jnp.sinc,
        "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)) if category(x.dtype) == 3 else jax.nn.sigmoid(x),
        "erf": special.erf,
        "erfc": special.erfc,
        "erfinv": _erfinv,
        "lgamma": lgamma,
        "digamma": digamma,
        "i0": jnp.i0,
        "special_i0e": special.i0e,
        "special_i1": special.i1,
        "special_modified_bessel_i0": special.i0,
        "special_modified_bessel_i1": special.i1,
        "special_i1e": special.i1e,
        "special_ndtri": special.ndtri,
        "special_entr": special.entr,
        "special_log_ndtr": special.log_ndtr,
        "floor": lambda x: jnp.floor(x) if category(x.dtype) == 2 else x,
        "ceil": lambda x: jnp.ceil(x) if category(x.dtype) == 2 else x,
        "trunc": lambda x: jnp.trunc(x) if category(x.dtype) == 2 else x,
        "round.default": round_half_to_even,
        "frac": lambda x: x - lax.stop_gradient(jnp.trunc(x)),
        "sign": _sign,
        "sgn": _sgn,
        "reciprocal": _reciprocal,
        "square": lambda x: x * x,
        "angle": _angle,
        "positive": lambda x: x,
        "conj_physical": jnp.conj,
        "_conj_physical": jnp.conj,
        "deg2rad": jnp.deg2rad,
        "rad2deg": jnp.rad2deg,
        "isnan": jnp.isnan,
        "isinf": jnp.isinf,
        "isfinite": jnp.isfinite,
        "isposinf": jnp.isposinf,
        "isneginf": jnp.isneginf,
        "signbit": lambda x: jnp.signbit(x) if category(x.dtype) == 2 else x < 0,
        "logical_not": lambda x: x == 0,
        "bitwise_not": lambda x: ~x,
    }
)
