"""Airy's function: a power series near zero, a wave of negative numbers, a fall of positive ones.

Source: Cephes, as in torch (`ATen/native/Math.h`), where leading ones of denominators are missing, see `bessel.py`.
"""

import math
from typing import Any

import jax.numpy as jnp

from .approximations import pieces, polynomial, quotient
from .elementwise import register_unary

_EDGE = 2.09
_LARGEST = 103.892
"""Beyond it is zero."""


def _airy_ai(x: Any) -> Any:
    found = pieces(x >= _EDGE, jnp.minimum(x, _LARGEST), _EDGE, _falling, _rest)
    return jnp.where(jnp.isinf(x), jnp.nan, jnp.where(x > _LARGEST, 0, found))


def _rest(x: Any) -> Any:
    return pieces(x < -_EDGE, x, -_EDGE, _wave, _series)


def _falling(x: Any) -> Any:
    root = jnp.sqrt(x)
    zeta = 2 / 3 * x * root
    return quotient(1 / zeta, _FALL_OVER, _FALL_UNDER) * jnp.exp(-zeta) / (2 * math.sqrt(math.pi) * jnp.sqrt(root))


def _wave(x: Any) -> Any:
    root = jnp.sqrt(-x)
    zeta = -2 / 3 * x * root
    z = 1 / zeta
    square, phase = z * z, zeta + math.pi / 4
    p, q = 1 + square * quotient(square, *_IN_PHASE), z * quotient(square, *_BEHIND)
    return (jnp.sin(phase) * p - jnp.cos(phase) * q) / (math.sqrt(math.pi) * jnp.sqrt(root))


def _series(x: Any) -> Any:
    """Two power series of the cube, of the solutions of `y'' = x y` that begin as `1` and `x`."""
    cube = x * x * x
    return 0.355028053887817239260 * polynomial(cube, _ONE) - 0.258819403792806798405 * x * polynomial(cube, _X)


def _coefficients(first: int) -> list[float]:
    found = [1.0]
    for k in range(1, 17):
        found.append(found[-1] / ((3 * k - first) * (3 * k + 1 - first)))
    return found[::-1]


_ONE, _X = _coefficients(1), _coefficients(0)

_FALL_OVER = (
    0.346538101525629,
    12.007595273964581,
    76.27960536152345,
    168.08922493463058,
    159.75639135016442,
    70.53609068404442,
    14.026469116338967,
    1.0,
)
_FALL_UNDER = (
    0.5675945326387702,
    14.75625625848472,
    84.51389701414746,
    177.31808814540045,
    164.2346928715297,
    71.47784008255756,
    14.095913560783403,
    1.0,
)
_IN_PHASE = (
    (
        -0.1316963234183318,
        -0.6264565444319123,
        -0.6931580360369335,
        -0.2797799815451191,
        -0.04919001326095003,
        -0.004062659235948854,
        -0.0001592764962392621,
        -2.776491081552329e-06,
        -1.6778769848911465e-08,
    ),
    (
        1.0,
        13.356042070655324,
        32.682503279522464,
        26.736704094149957,
        9.187074029072596,
        1.4752914677166642,
        0.11568717379518804,
        0.004402916416152112,
        7.547203482874142e-05,
        4.5185009297058035e-07,
    ),
)
_BEHIND = (
    (
        0.01973399320916857,
        0.39110302961568827,
        1.0657989759959559,
        0.9391692298166502,
        0.35146565610554764,
        0.06338889196289255,
        0.005858041130483885,
        0.000282851600836737,
        6.98793669997261e-06,
        8.117892395543892e-08,
        3.415517847659236e-10,
    ),
    (
        1.0,
        9.30892908077442,
        19.835292871831214,
        15.564662893286462,
        5.476860694229755,
        0.9542936116189619,
        0.08645808263523921,
        0.004126565238242226,
        0.00010125908511650914,
        1.1716673321441352e-06,
        4.9183457006293e-09,
    ),
)

register_unary("special_airy_ai", _airy_ai)
