"""Bessel functions of orders zero and one: near zero quotients of polynomials, elsewhere waves.

torch leaves out the leading one of some denominators of Cephes', by which it is off by up to 1e-6; here it is there.
torch has no derivatives of these functions; here they have their own.

Source: Cephes, as in torch (`ATen/native/Math.h`).
"""

import math
from typing import Any

import jax.numpy as jnp

from .approximations import of_positive, pieces, polynomial, quotient
from .elementwise import register_unary


def _j0(x: Any) -> Any:
    return pieces(jnp.abs(x) <= 5, x, 5.0, _j0_near, lambda x: _waves(jnp.abs(x), 0)[0])


def _j1(x: Any) -> Any:
    return pieces(jnp.abs(x) <= 5, x, 5.0, _j1_near, lambda x: jnp.sign(x) * _waves(jnp.abs(x), 1)[0])


def _y0(x: Any) -> Any:
    def near(x: Any) -> Any:
        return quotient(x * x, _Y0_OVER, _Y0_UNDER) + 2 / math.pi * jnp.log(x) * _j0_near(x)

    return of_positive(x, -jnp.inf, lambda x: pieces(x <= 5, x, 5.0, near, lambda x: _waves(x, 0)[1]))


def _y1(x: Any) -> Any:
    def near(x: Any) -> Any:
        return x * quotient(x * x, _Y1_OVER, _Y1_UNDER) + 2 / math.pi * (_j1_near(x) * jnp.log(x) - 1 / x)

    return of_positive(x, -jnp.inf, lambda x: pieces(x <= 5, x, 5.0, near, lambda x: _waves(x, 1)[1]))


def _spherical_j0(x: Any) -> Any:
    """`sin(x) / x`, near zero by its series."""
    series = [(-1) ** k / math.factorial(2 * k + 1) for k in reversed(range(7))]
    found = pieces(jnp.abs(x) < 0.5, x, 0.5, lambda x: polynomial(x * x, series), lambda x: jnp.sin(x) / x)
    return jnp.where(jnp.isinf(x), 0, found)


def _j0_near(x: Any) -> Any:
    square = x * x
    found = (square - 5.78318596294678452118) * (square - 30.4712623436620863991)
    return jnp.where(jnp.abs(x) < 1e-5, 1 - square / 4, found * quotient(square, _J0_OVER, _J0_UNDER))


def _j1_near(x: Any) -> Any:
    square = x * x
    found = quotient(square, _J1_OVER, _J1_UNDER) * x
    return found * (square - 14.6819706421238932572) * (square - 49.2184563216946036703)


def _waves(x: Any, order: int) -> tuple[Any, Any]:
    """The functions of the first and of the second kind, from five on."""
    one, other = _AMPLITUDES[order]
    square, phase = 25 / (x * x), x - (order / 2 + 1 / 4) * math.pi
    scale = math.sqrt(2 / math.pi) / jnp.sqrt(x)
    p, q = scale * quotient(square, *one), scale * 5 / x * quotient(square, *other)
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    return p * cos - q * sin, p * sin + q * cos


_J0_OVER = (-4794432209.782018, 1956174919465.5657, -249248344360967.72, 9708622510473064.0)
_J0_UNDER = (
    1.0,
    499.563147152651,
    173785.4016763747,
    48440965.83399621,
    11185553704.535683,
    2112775201154.892,
    310518229857422.56,
    3.1812195594320496e16,
    1.7108629408104315e18,
)
_J1_OVER = (-899971225.7055594, 452228297998.19403, -72749424522181.83, 3682957328638529.0)
_J1_UNDER = (
    1.0,
    620.8364781180543,
    256987.25675774884,
    83514679.14319493,
    22151159547.97925,
    4749141220799.914,
    784369607876235.9,
    8.952223361846274e16,
    5.322786203326801e18,
)
_Y0_OVER = (
    15592.436785523574,
    -14663929.59039716,
    5435264770.518765,
    -982136065717.9115,
    87590639439536.7,
    -3466283033847297.0,
    4.4273326857256984e16,
    -1.8495080043698668e16,
)
_Y0_UNDER = (
    1.0,
    1041.2835366425984,
    626107.330137135,
    268919633.39381415,
    86400248710.3935,
    20297961275010.555,
    3171577528429750.5,
    2.5059625617265306e17,
)
_Y1_OVER = (
    1263204747.9017804,
    -647355876379.1603,
    114509511541823.73,
    -8127702555013251.0,
    2.024394757135949e17,
    -7.788771962659501e17,
)
_Y1_UNDER = (
    1.0,
    594.3015923461282,
    235564.09294306856,
    73481194.44597217,
    18760131610.870617,
    3882312774962.3857,
    620557727146953.8,
    6.871410873553005e16,
    3.9727060811656064e18,
)
_AMPLITUDES = (
    (
        (
            (
                0.0007969367292973471,
                0.08283523921074408,
                1.239533716464143,
                5.447250030587687,
                8.74716500199817,
                5.303240382353949,
                1.0,
            ),
            (
                0.0009244088105588637,
                0.08562884743544745,
                1.2535274390105895,
                5.470977403304171,
                8.761908832370695,
                5.306052882353947,
                1.0,
            ),
        ),
        (
            (
                -0.011366383889846916,
                -1.2825271867050931,
                -19.553954425773597,
                -93.20601521237683,
                -177.68116798048806,
                -147.07750515495118,
                -51.41053267665993,
                -6.050143506007285,
            ),
            (
                1.0,
                64.3178256118178,
                856.4300259769806,
                3882.4018360540163,
                7240.467741956525,
                5930.727011873169,
                2062.0933166032783,
                242.0057402402914,
            ),
        ),
    ),
    (
        (
            (
                0.0007621256162081731,
                0.07313970569409176,
                1.1271960812968493,
                5.112079511468076,
                8.424045901417724,
                5.214515986823615,
                1.0,
            ),
            (
                0.0005713231280725487,
                0.06884559087544954,
                1.105142326340617,
                5.073863861286015,
                8.399855543276042,
                5.209828486823619,
                1.0,
            ),
        ),
        (
            (
                0.05108625947501766,
                4.982138729512334,
                75.82382841325453,
                366.7796093601508,
                710.8563049989261,
                597.4896124006136,
                211.68875710057213,
                25.207020585802372,
            ),
            (
                1.0,
                74.23732770356752,
                1056.4488603826283,
                4986.410583376536,
                9562.318924047562,
                7997.041604473507,
                2826.1927851763908,
                336.0936078106983,
            ),
        ),
    ),
)
"""For each order: those of the wave in phase, and of the one behind."""

register_unary("special_bessel_j0", _j0)
register_unary("special_bessel_j1", _j1)
register_unary("special_bessel_y0", _y0)
register_unary("special_bessel_y1", _y1)
register_unary("special_spherical_bessel_j0", _spherical_j0)
