"""Random numbers as they are drawn on a GPU, here on the CPU with the same bits, made by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from philox_reference import philox
from torch import nn


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    library = torch.library.Library("torchleaf", "IMPL")
    library.impl("random_bits", philox, "CPU")
    monkeypatch.setattr("torchleaf.interop.modes.random.can_draw", lambda device: True)
    monkeypatch.setattr("torchleaf.interop.tracing.trace.can_draw", lambda device: True)
    monkeypatch.setattr("torchleaf.interop.modes.random._draw", _of_host)
    yield
    library._destroy()


def _of_host(*args):
    raise AssertionError("the host has read the key")


def test_known_answers():
    """Of Random123's kat_vectors: key and counter of zeros, of ones, and of digits of pi."""
    assert philox(torch.zeros(1, 4, dtype=torch.uint32), 4, 0).numpy().view(np.uint32).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ]


N = 20_000
DRAWS = {
    "rand": (lambda x: torch.rand(N), "uniform", (0, 1)),
    "rand_like": (torch.rand_like, "uniform", (0, 1)),
    "uniform_": (lambda x: x.clone().uniform_(-1, 3), "uniform", (-1, 4)),
    "randn": (lambda x: torch.randn(N), "norm", (0, 1)),
    "normal_": (lambda x: x.clone().normal_(2, 3), "norm", (2, 3)),
    "normal": (lambda x: torch.normal(x, 2.0), "norm", (0, 2)),
    "normal of a size": (lambda x: torch.normal(1.0, 2.0, (N,)), "norm", (1, 2)),
    "exponential_": (lambda x: x.clone().exponential_(2), "expon", (0, 0.5)),
    "log_normal_": (lambda x: x.clone().log_normal_(0, 0.5), "lognorm", (0.5,)),
    "cauchy_": (lambda x: x.clone().cauchy_(1, 2), "cauchy", (1, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_distributions(name, dtype, x64):
    from scipy import stats

    draw, distribution, parameters = DRAWS[name]
    fn = torchleaf.torch_function(lambda x: draw(x).to(dtype))
    drawn = np.asarray(fn(jnp.zeros(N, str(dtype)[6:]), key=jax.random.key(1)))
    assert drawn.dtype == np.dtype(str(dtype)[6:])
    assert stats.kstest(drawn, lambda x: getattr(stats, distribution).cdf(x, *parameters)).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_uniform_numbers_are_below_one(dtype, x64):
    fn = torchleaf.torch_function(lambda: torch.rand(N, dtype=dtype))
    drawn = np.asarray(fn(key=jax.random.key(2)).astype(jnp.float64))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("draw", "p"),
    [
        (lambda x: x.bernoulli_(0.3), 0.3),
        (lambda x: torch.bernoulli(torch.full_like(x, 0.2)), 0.2),
        (lambda x: torch.bernoulli(x, 0.7), 0.7),
        (lambda x: x.bernoulli_(torch.full_like(x, 0.6)), 0.6),
        (lambda x: torch.randint(0, 4, (N,)) == 3, 0.25),
        (lambda x: torch.randint_like(x, 2, 7) == 2, 0.2),
        (lambda x: torch.randint(-(2**62), 2**62, (N,)) > 0, 0.5),
        (lambda x: x.long().random_(5) == 4, 0.2),
        (lambda x: x.geometric_(0.4) == 2, 0.24),
        (lambda x: nn.functional.dropout(x + 1, 0.1) == 0, 0.1),
        (lambda x: nn.functional.dropout(x + 1, 0.25) == 1 / 0.75, 0.75),
    ],
)
def test_discrete_distributions(draw, p):
    fn = torchleaf.torch_function(lambda x: draw(x).float().mean())
    assert abs(fn(jnp.zeros(N), key=jax.random.key(3)) - p) < 4 * (p * (1 - p) / N) ** 0.5


@pytest.mark.parametrize("key", [jax.random.key(4), jax.random.key(4, impl="rbg")], ids=["threefry", "rbg"])
def test_one_key_one_result(key):
    fn = torchleaf.torch_function(lambda x: nn.functional.dropout(x) + torch.randn_like(x))
    x = jnp.ones((5, 7))
    first = fn(x, key=key)
    np.testing.assert_array_equal(first, jax.jit(fn)(x, key=key))
    assert not np.array_equal(first, fn(x, key=jax.random.fold_in(key, 1)))
    draws = torchleaf.torch_function(lambda: (torch.rand(9), torch.rand(9)))(key=key)
    assert not np.array_equal(*draws)


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_the_backward_pass_has_the_mask_of_the_forward_pass(residuals):
    fn = torchleaf.torch_function(lambda x: nn.functional.dropout(x, 0.5), residuals=residuals)
    x, key = jnp.ones(30), jax.random.key(5)

    def both(x):
        return jax.value_and_grad(lambda x: (y := fn(x, key=key)).sum() * (y[0] * 0 + 1))(x)[1], fn(x, key=key)

    for run in (both, jax.jit(both)):
        for _ in range(4):
            gradient, y = run(x)
            np.testing.assert_array_equal(gradient == 0, y == 0)


@pytest.mark.parametrize("nested", [False, True])
def test_each_example_draws_from_its_own_key(nested):
    fn = torchleaf.torch_function(lambda x: (nn.functional.dropout(x, 0.4), torch.randn(3), x + torch.rand_like(x)))
    keys = jax.random.split(jax.random.key(6), (4, 2) if nested else 4)
    xs = jnp.arange(1.0, 1 + 4 * 2 * 5).reshape(4, 2, 5)
    xs = xs if nested else xs[:, 0]

    def call(x, key):
        return fn(x, key=key)

    batched = jax.vmap(jax.vmap(call))(xs, keys) if nested else jax.vmap(call)(xs, keys)
    for index in np.ndindex(xs.shape[:-1]):
        for ours, alone in zip(batched, fn(xs[index], key=keys[index]), strict=True):
            np.testing.assert_array_equal(ours[index], alone)


@pytest.mark.long
def test_calls_that_draw_are_replayed():
    runs = []

    def noisy(x):
        runs.append(0)
        return nn.functional.dropout(torch.tanh(x)) * torch.rand_like(x)

    step = jax.jit(jax.value_and_grad(lambda x, key: jnp.sum(torchleaf.torch_function(noisy)(x, key=key) ** 2)))
    plain = jax.value_and_grad(lambda x, key: jnp.sum(torchleaf.torch_function(noisy, replay=False)(x, key=key) ** 2))
    x = jnp.linspace(-1, 1, 50)
    results = [step(x, jax.random.key(i)) for i in range(6)]
    before = len(runs)
    results += [step(x, jax.random.key(i)) for i in range(6, 9)]
    assert len(runs) == before
    for i, (value, gradient) in enumerate(results):
        expected, expected_gradient = plain(x, jax.random.key(i))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
