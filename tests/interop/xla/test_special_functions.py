"""Functions that torch has by approximations, and these ops by the same ones: their values, edges and derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as special
import torch
import torchleaf

pytestmark = pytest.mark.all_cases


class Special(NamedTuple):
    """What SciPy says of a function, and between which numbers."""

    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    low: float
    high: float


FUNCTIONS = {
    "bessel_j0": Special(special.j0, lambda x: special.jvp(0, x), -60, 60),
    "bessel_j1": Special(special.j1, lambda x: special.jvp(1, x), -60, 60),
    "bessel_y0": Special(special.y0, lambda x: special.yvp(0, x), 0.1, 60),
    "bessel_y1": Special(special.y1, lambda x: special.yvp(1, x), 0.1, 60),
    "modified_bessel_k0": Special(special.k0, lambda x: special.kvp(0, x), 0.1, 60),
    "modified_bessel_k1": Special(special.k1, lambda x: special.kvp(1, x), 0.1, 60),
    "scaled_modified_bessel_k0": Special(special.k0e, lambda x: special.k0e(x) - special.k1e(x), 0.1, 60),
    "scaled_modified_bessel_k1": Special(
        special.k1e, lambda x: special.k1e(x) - special.k0e(x) - special.k1e(x) / x, 0.1, 60
    ),
    "spherical_bessel_j0": Special(
        lambda x: special.spherical_jn(0, x), lambda x: special.spherical_jn(0, x, derivative=True), -60, 60
    ),
    "airy_ai": Special(lambda x: special.airy(x)[0], lambda x: special.airy(x)[1], -20, 20),
}
EDGES = [0.0, -0.0, 1e-30, -1e-6, -1.0, 0.5, 2.0, 2.09, -2.09, 5.0, -5.0, 103.9, 1e5, np.inf, -np.inf, np.nan]


def by_xla(name):
    return torchleaf.torch_function(getattr(torch.special, name), engine="xla", strict=True)


def _error(actual, right):
    """The largest, in relation to what is larger than one."""
    return (np.abs(actual - right) / np.maximum(np.abs(right), 1)).max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name):
    value, _, low, high = FUNCTIONS[name]
    x = np.linspace(low, high, 20_001)
    with jax.enable_x64(True):
        assert _error(np.asarray(by_xla(name)(jnp.asarray(x))), value(x)) < 1e-14
    torchs = getattr(torch.special, name)(torch.tensor(x)).numpy()
    assert _error(torchs, value(x)) < 4e-6  # by which it misses some of Cephes' coefficients


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_in_single_precision(name):
    value, _, low, high = FUNCTIONS[name]
    x = np.linspace(low, high, 20_001).astype(np.float32)
    actual, torchs = by_xla(name)(jnp.asarray(x)), getattr(torch.special, name)(torch.tensor(x)).numpy()
    assert actual.dtype == jnp.float32
    right = value(x.astype(float))
    assert _error(np.asarray(actual), right) < max(1.5 * _error(torchs, right), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges_are_torchs(name, dtype):
    edges = np.array(EDGES, dtype)
    with jax.enable_x64(True):
        actual = np.asarray(by_xla(name)(jnp.asarray(edges)))
    right = getattr(torch.special, name)(torch.tensor(edges)).numpy()
    np.testing.assert_allclose(actual, right, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    _, slope, low, high = FUNCTIONS[name]
    x = np.linspace(low, high, 2_000)
    step = 1e-5
    curvature = (slope(x + step) - slope(x - step)) / (2 * step)
    with jax.enable_x64(True):
        first = jax.grad(by_xla(name))
        of_each = jax.jit(jax.vmap(lambda x: (first(x), jax.grad(first)(x), jax.jacfwd(first)(x))))
        found, reverse, forward = map(np.asarray, of_each(x))
    assert _error(found, slope(x)) < 1e-12
    assert _error(reverse, curvature) < 1e-6
    assert _error(forward, curvature) < 1e-6


@pytest.mark.long
def test_derivatives_at_zero():
    with jax.enable_x64(True):
        for name, expected in {
            "bessel_j0": [0, -0.5],
            "bessel_j1": [0.5, 0],
            "spherical_bessel_j0": [0, -1 / 3],
            "airy_ai": [-0.2588194037928068, 0],
        }.items():
            first = jax.grad(by_xla(name))
            found = jax.jit(lambda x, first=first: (first(x), jax.grad(first)(x)))(0.0)
            np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_are_promoted(name):
    for x in (torch.arange(1, 4), torch.tensor([True])):
        right = getattr(torch.special, name)(x)
        actual = by_xla(name)(torchleaf.to_jax(x))
        assert actual.dtype == torchleaf.to_jax(right).dtype == jnp.float32
        np.testing.assert_allclose(actual, right, rtol=2e-6, atol=1e-6)


POLYNOMIALS = {
    "chebyshev_polynomial_t": special.chebyt,
    "chebyshev_polynomial_u": special.chebyu,
    "shifted_chebyshev_polynomial_t": special.sh_chebyt,
    "hermite_polynomial_h": special.hermite,
    "hermite_polynomial_he": special.hermitenorm,
    "laguerre_polynomial_l": special.laguerre,
    "legendre_polynomial_p": special.legendre,
}


@pytest.mark.long
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_derivatives_of_polynomials(name):
    x, degrees = np.linspace(-1, 1, 7), np.arange(5)[:, None]
    function = getattr(torch.special, name)
    with jax.enable_x64(True):
        ours = torchleaf.torch_function(lambda x: function(x, torch.tensor(degrees)), engine="xla", strict=True)

        def along(weights):
            return jax.grad(lambda x: (weights * ours(x)).sum())

        weights = np.random.default_rng(0).normal(size=(5, 7))
        first, second = along(weights)(x), jax.grad(lambda x: along(weights)(x).sum())(x)
    for order, actual in ((1, first), (2, second)):
        each = np.array([np.polyval(np.polyder(POLYNOMIALS[name](n).coeffs, order), x) for n in range(5)])
        np.testing.assert_allclose(actual, (weights * each).sum(0), rtol=1e-10, atol=1e-10)
