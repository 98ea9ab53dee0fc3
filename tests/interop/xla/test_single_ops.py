"""Ops of which the operator database says too little: by samples of their own, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, from_torch, torch_gradients

pytestmark = pytest.mark.all_cases
RNG = np.random.default_rng(0)


def _uniform(*shape):
    return torch.from_numpy(RNG.uniform(size=shape))


OF_IMAGES, OF_IMAGE, OF_VOLUMES, MASK = _uniform(2, 3, 2), _uniform(1, 3, 2), _uniform(2, 3, 3), _uniform(4, 1) > 0.5

FUNCTIONS = {
    "fractional_max_pool2d": (
        lambda x: F.fractional_max_pool2d(x, (3, 2), (4, 3), return_indices=True, _random_samples=OF_IMAGES),
        (2, 3, 9, 10),
    ),
    "fractional_max_pool2d, no batch, one window": (
        lambda x: F.fractional_max_pool2d(x, (2, 4), (1, 3), return_indices=True, _random_samples=OF_IMAGE),
        (3, 9, 10),
    ),
    "fractional_max_pool3d": (
        lambda x: F.fractional_max_pool3d(x, (3, 2, 3), (4, 3, 2), return_indices=True, _random_samples=OF_VOLUMES),
        (2, 3, 9, 10, 7),
    ),
    "combinations": (lambda x: (torch.combinations(x, 3, with_replacement=True), torch.combinations(x)), (5,)),
    "masked_select": (
        lambda x: (torch.masked_select(x, MASK), x[MASK[:, 0]], x.t()[:, MASK[:, 0]]),
        (4, 6),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name):
    fn, shape = FUNCTIONS[name]
    with jax.enable_x64(True):
        ours = torchleaf.torch_function(fn, engine="xla", strict=True)
        x = jnp.asarray(RNG.normal(size=shape))
        assert_trees_close(ours(x), from_torch(fn(torch.tensor(np.asarray(x)))))

        def first(f, x):
            return (f(x)[0] ** 2).sum()

        gradient = jax.grad(lambda x: first(ours, x))(x)
        (expected,) = torch_gradients(lambda x: first(fn, x), x)
        assert_trees_close(gradient, expected)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4, 4), (3, 0)], ids=str)
def test_geqrf(shape):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=shape))
        actual = torchleaf.torch_function(torch.geqrf, engine="xla", strict=True)(x)
        assert_trees_close(tuple(actual), from_torch(tuple(torch.geqrf(torch.tensor(np.asarray(x))))))


def test_windows_at_random_places_differ_by_the_key():
    pool = torchleaf.torch_function(lambda x: F.fractional_max_pool2d(x, 2, 5), engine="xla", strict=True)
    x = jnp.asarray(RNG.normal(size=(1, 16, 16)), jnp.float32)
    one, again, other = (pool(x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int8, torch.bool])
def test_hashes(dtype):
    x = (10 * _uniform(2, 3, 4) - 5).to(dtype)

    def fn(x):
        return torch.hash_tensor(x), torch.hash_tensor(x, 1), torch.hash_tensor(x, 2, keepdim=True)

    with jax.enable_x64(True):
        actual = torchleaf.torch_function(fn, engine="xla", strict=True)(torchleaf.to_jax(x))
    for a, e in zip(actual, fn(x), strict=True):
        assert a.dtype == jnp.uint64
        np.testing.assert_array_equal(a, e.numpy())


def test_a_batch_norm_that_updates():
    weight, bias = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def fn(x):
        mean, var = torch.zeros_like(bias), torch.ones_like(weight)
        y, *_ = torch.ops.aten._batch_norm_with_update(x, weight, bias, mean, var, 0.1, 1e-5)
        return y, mean, var

    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=(4, 3, 2)))
        actual = torchleaf.torch_function(fn, engine="xla", strict=True)(x)
        assert_trees_close(actual, from_torch(fn(torch.tensor(np.asarray(x)))))
