"""Orthogonal polynomials, by their recurrences: of a negative degree they are zero.

Source: DLMF 18.9.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..promotion import promoting
from .elementwise import pointwise


def _polynomial(
    first: Callable[[Any], Any], following: Callable[[Any, Any, Any, Any], Any], shift: bool = False
) -> Callable[[Any, Any], Any]:
    """A polynomial of `x`, of degree `n`, by that of degree one and `following(k, x, p_k, p_{k-1})`."""

    def value(x: Any, n: Any) -> Any:
        def step(carry: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
            k, before, last, found = carry
            after = following(k, x, last, before)
            return k + 1, last, after, jnp.where(n == k + 1, after, found)

        one, degree_one = jnp.ones_like(x), first(x)
        found = jnp.where(n == 0, one, jnp.where(n == 1, degree_one, 0))
        k = jnp.ones((), x.dtype)
        return lax.while_loop(lambda carry: jnp.any(n > carry[0]), step, (k, one, degree_one, found))[3]

    smooth = _smooth(value)
    return lambda x, n: smooth(*jnp.broadcast_arrays(2 * x - 1 if shift else x, jnp.trunc(n)))


def _smooth(value: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same, whose derivative is a factor that is computed forward: JAX does not run its loops backward."""

    def slope(x: Any, n: Any) -> Any:
        return jax.jvp(lambda x: value(x, n), (x,), (jnp.ones_like(x),))[1]

    run = jax.custom_jvp(value)
    run.defjvp(promoting(lambda primals, tangents: (run(*primals), _smooth(slope)(*primals) * tangents[0])))
    return run


def _chebyshev(k: Any, x: Any, p: Any, before: Any) -> Any:
    return 2 * x * p - before


for _kind, _first in {
    "t": lambda x: x,
    "u": lambda x: 2 * x,
    "v": lambda x: 2 * x - 1,
    "w": lambda x: 2 * x + 1,
}.items():
    pointwise(f"special_chebyshev_polynomial_{_kind}")(_polynomial(_first, _chebyshev))
    pointwise(f"special_shifted_chebyshev_polynomial_{_kind}")(_polynomial(_first, _chebyshev, shift=True))

pointwise("special_hermite_polynomial_h")(
    _polynomial(lambda x: 2 * x, lambda k, x, p, before: 2 * x * p - 2 * k * before)
)
pointwise("special_hermite_polynomial_he")(_polynomial(lambda x: x, lambda k, x, p, before: x * p - k * before))
pointwise("special_laguerre_polynomial_l")(
    _polynomial(lambda x: 1 - x, lambda k, x, p, before: ((2 * k + 1 - x) * p - k * before) / (k + 1))
)
pointwise("special_legendre_polynomial_p")(
    _polynomial(lambda x: x, lambda k, x, p, before: ((2 * k + 1) * x * p - k * before) / (k + 1))
)
