"""torch's rules of promotion hold inside a torch call, whatever a user has JAX allow in his own code."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import twins
from compare import assert_trees_close
from torch import nn
from torch.nn import functional as F
from torchleaf import TorchModule, torch_function

X = twins.normal((3, 4))[0]
FUNCTIONS = {
    "broadcast": lambda x: x + x[0] * torch.arange(4),
    "mixed dtypes": lambda x: x.half() * 2 + x.bfloat16() + torch.arange(4),
    "abs": lambda x: x.abs() + torch.fft.rfft(x).abs().sum(),
    "powers": lambda x: x.abs() ** 1.5 + 2**x + torch.pow(x.exp(), x[0]),
    "relu": lambda x: F.relu(x) + F.hardswish(x[0]),
    "gamma": lambda x: torch.lgamma(x.abs() + 1) + torch.polygamma(1, x.abs() + 1) + torch.digamma(x.abs() + 1),
    "polynomials": lambda x: torch.special.chebyshev_polynomial_t(x, torch.tensor(3)),
    "pinv": lambda x: torch.linalg.pinv(x).T + x[0],
    "reductions": lambda x: x.std(0) + x.prod(1, keepdim=True) + x.logsumexp(0),
    "losses": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2]), label_smoothing=0.1) + F.huber_loss(x, x.detach()),
}
MODULES = {
    "LSTM": lambda: nn.LSTM(4, 5, 2),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    "norms": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.GELU()),
}


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def all_of(fn, x):
    """A value, first and second derivatives, and a batch."""

    def loss(x):
        return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(fn(x)))

    tangent = jnp.ones_like(x)
    return (
        jax.value_and_grad(loss)(x),
        jax.jvp(jax.jit(jax.grad(loss)), (x,), (tangent,)),
        jax.vmap(loss)(jnp.stack([x, x + tangent])),
    )


@pytest.mark.parametrize("name", ["broadcast", "abs"])
def test_values_and_gradients(name):
    fn = torch_function(FUNCTIONS[name], engine="xla")
    expected = jax.value_and_grad(lambda x: jnp.sum(fn(x)))(X)
    with strict():
        assert_trees_close(jax.value_and_grad(lambda x: jnp.sum(fn(x)))(X), expected, rtol=1e-6)


@pytest.mark.long
@pytest.mark.all_cases
@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(fn):
    expected = all_of(torch_function(fn, engine="xla"), X)
    with strict():
        assert_trees_close(all_of(torch_function(fn, engine="xla"), X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.long
@pytest.mark.all_cases
@pytest.mark.parametrize(("name", "engine"), [*((name, "xla") for name in MODULES), ("norms", "torch")])
def test_modules(name, engine):
    model = TorchModule(MODULES[name](), engine=engine)
    expected = all_of(model, X)
    gradient = eqx.filter_grad(lambda model: jnp.sum(jax.tree.leaves(model(X))[0] ** 2))
    weights = gradient(model)
    with strict():
        assert_trees_close(all_of(model, X), expected, rtol=1e-5, atol=1e-6)
        assert_trees_close(gradient(model).params, weights.params, rtol=1e-4, atol=1e-5)


def test_the_users_own_code_is_held_to_his_rules():
    with strict(), pytest.raises(ValueError, match="rank_promotion"):
        jax.jit(lambda x: torch_function(lambda x: x * 2, engine="xla")(x) + x[0])(X)
