"""Random numbers: the same key, the same numbers; distributed as torch's are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_same_bits

pytestmark = pytest.mark.all_cases
N = 20_000

DRAWS = {
    "rand": lambda x: torch.rand_like(x),
    "randn": lambda x: torch.randn(x.shape),
    "normal": lambda x: torch.normal(x * 0 + 1, 2.0),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 3),
    "normal_ into zeros": lambda x: torch.zeros(N).normal_(2.0, 0.5),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "bernoulli": lambda x: torch.bernoulli(x * 0 + 0.3),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.8),
    "randint": lambda x: torch.randint(3, 9, x.shape).float(),
    "dropout": lambda x: F.dropout(x * 0 + 1, 0.25),
    "alpha_dropout": lambda x: F.alpha_dropout(x * 0 + 1, 0.25, training=True),
    "poisson": lambda x: torch.poisson(x * 0 + 3),
    "gamma": lambda x: torch.distributions.Gamma(2.0, 3.0, validate_args=False).sample((N,)) + 0 * x,
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(0.1, 0.3),
    "multinomial": lambda x: torch.multinomial(torch.tensor([1.0, 2.0, 5.0]), N, replacement=True).float(),
    "rrelu": lambda x: F.rrelu(x * 0 - 1, training=True),
}


def by_xla(fn):
    return torchleaf.torch_function(fn, engine="xla", strict=True)


@pytest.mark.long
@pytest.mark.parametrize("name", DRAWS)
def test_distribution_is_torchs(name):
    """Means and deviations, within five standard errors of each other."""
    fn = DRAWS[name]
    drawn = np.asarray(by_xla(fn)(jnp.zeros(N), key=jax.random.key(1)), np.float64)
    right = fn(torch.zeros(N)).double().numpy()
    assert drawn.shape == right.shape
    for power in (1, 2):
        a, b = drawn**power, right**power
        assert abs(a.mean() - b.mean()) <= 5 * np.sqrt((a.var() + b.var()) / N) + 1e-12
    assert abs(drawn.min() - right.min()) <= 0.2 * max(1, abs(right.min()))


def test_numbers_follow_from_the_key_alone():
    ours = by_xla(lambda x: (F.dropout(x, 0.5), torch.rand(3), torch.rand(3)))
    x, key = jnp.ones(100), jax.random.key(0)
    before = torch.random.get_rng_state()
    first = ours(x, key=key)
    assert_same_bits(jax.jit(ours)(x, key=key), first)
    assert_same_bits(ours(x, key=key), first)
    assert not np.array_equal(ours(x, key=jax.random.key(1))[0], first[0])
    assert not np.array_equal(first[1], first[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_example_has_numbers_of_its_own():
    ours = by_xla(lambda x: F.dropout(x, 0.5))
    keys, xs = jax.random.split(jax.random.key(0), 4), jnp.ones((4, 50))
    batched = jax.vmap(lambda x, key: ours(x, key=key))(xs, keys)
    assert_same_bits(batched, jnp.stack([ours(x, key=key) for x, key in zip(xs, keys, strict=True)]))


def test_gradients_pass_through_the_same_mask():
    ours = by_xla(lambda x: F.dropout(x, 0.5))
    x, key = jnp.ones(50), jax.random.key(3)
    assert_same_bits(jax.grad(lambda x: ours(x, key=key).sum())(x), ours(x, key=key))


def test_dropout_between_recurrent_layers():
    lstm = torch.nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    model = torchleaf.TorchModule(lstm, engine="xla", strict=True)
    x = jnp.ones((5, 2, 3))
    a, b = (model(x, key=jax.random.key(i))[0] for i in (0, 1))
    assert not np.array_equal(a, b)
    assert_same_bits(model(x, key=jax.random.key(0))[0], a)


def test_no_key_is_an_error():
    with pytest.raises(torchleaf.RandomnessError, match="draws random numbers"):
        by_xla(lambda x: F.dropout(x, 0.5))(jnp.ones(3))


def test_pythons_own_numbers_are_refused():
    import random

    with pytest.raises(torchleaf.TorchCallError, match="would be the same in every call"):
        by_xla(lambda x: x * random.random())(jnp.ones(3), key=jax.random.key(0))
