"""The gamma function's relatives, and what they are the derivatives of.

Source: Cephes, as in torch (`ATen/native/Math.h`); DLMF 5.15.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as special
from jax import lax

from ..dtypes import opmath
from ..promotion import promoting
from ..table import op


@jax.custom_jvp
def lgamma(x: Any) -> Any:
    """The logarithm of the gamma function."""
    return special.gammaln(x)


@lgamma.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return lgamma(primals[0]), digamma(primals[0]) * tangents[0]


@jax.custom_jvp
def digamma(x: Any) -> Any:
    """The derivative of `lgamma`."""
    return special.digamma(x)


@digamma.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    return digamma(primals[0]), _polygamma(1, primals[0]) * tangents[0]


@op("polygamma")
def polygamma(n: int, x: Any, *, out: Any) -> Any:
    """The derivative of order `n` of `digamma`."""
    x = x.astype(opmath(out.dtype))
    return _polygamma(n, x) if n else digamma(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _polygamma(n: int, x: Any) -> Any:
    return _trigamma(x) if n == 1 else (-1) ** (n + 1) * math.factorial(n) * _zeta(n + 1, x)


@_polygamma.defjvp
@promoting
def _(n: int, primals: Any, tangents: Any) -> Any:
    return _polygamma(n, primals[0]), _polygamma(n + 1, primals[0]) * tangents[0]


def _trigamma(x: Any) -> Any:
    """By reflection for small numbers, and an asymptotic series for large ones."""
    small = x < 0.5
    mirrored = jnp.where(small, 1 - x, x)
    total = jnp.zeros_like(x)
    for _ in range(6):
        total, mirrored = total + 1 / mirrored**2, mirrored + 1
    square = 1 / mirrored**2
    total = total + (1 + 1 / (2 * mirrored) + square * (1 / 6 - square * (1 / 30 - square / 42))) / mirrored
    return jnp.where(small, (jnp.pi / jnp.sin(jnp.pi * x)) ** 2 - total, total)


def _zeta(order: int, x: Any) -> Any:
    """The Hurwitz zeta function of an integer order, also of negative numbers, one of which it is moved away from."""

    def power(x: Any) -> Any:
        return 1 / lax.integer_pow(x, order)

    def move(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        x, total = carry
        return jnp.where(x <= 0, x + 1, x), jnp.where(x <= 0, total + power(x), total)

    pole = (x <= 0) & (x == jnp.floor(x))
    start = jnp.where(pole | ~jnp.isfinite(x), 1, x)
    moved, total = lax.while_loop(lambda carry: jnp.any(carry[0] <= 0), move, (start, jnp.zeros_like(x)))
    found = total + special.zeta(jnp.asarray(order, x.dtype), moved)
    found = jnp.where(jnp.isposinf(x), 0, jnp.where(jnp.isfinite(x), found, jnp.nan))
    return jnp.where(pole, jnp.inf, found)
