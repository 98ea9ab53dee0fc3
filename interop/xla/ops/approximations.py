"""What approximations of functions are made of: quotients of polynomials, Chebyshev series, pieces."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

Table = Sequence[float]
"""Coefficients, that of the highest degree first."""


def polynomial(x: Any, table: Table) -> Any:
    """By Horner's rule."""
    total = jnp.full_like(x, table[0])
    for c in table[1:]:
        total = total * x + c
    return total


def quotient(x: Any, over: Table, under: Table) -> Any:
    """One polynomial by another one."""
    return polynomial(x, over) / polynomial(x, under)


def chebyshev(x: Any, table: Table) -> Any:
    """A series of Chebyshev polynomials of `x / 2`, by Clenshaw's rule; the constant counts half."""
    before, last, total = jnp.zeros_like(x), jnp.zeros_like(x), jnp.full_like(x, table[0])
    for c in table[1:]:
        before, last = last, total
        total = x * last - before + c
    return 0.5 * (total - before)


def pieces(chosen: Any, x: Any, meeting: float, one: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """One function where it is chosen, another one elsewhere; both have finite derivatives where they meet."""
    return jnp.where(chosen, one(jnp.where(chosen, x, meeting)), other(jnp.where(chosen, meeting, x)))


def of_positive(x: Any, at_zero: float, function: Callable[[Any], Any]) -> Any:
    """A function of positive numbers, which negative ones have no value of."""
    found = function(jnp.where(x <= 0, 1, x))
    return jnp.where(x < 0, jnp.nan, jnp.where(x == 0, at_zero, found))
