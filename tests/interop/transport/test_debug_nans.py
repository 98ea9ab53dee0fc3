"""`jax.debug_nans` and `jax.debug_infs` find torch calls as they find JAX's own ops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf

log = torchleaf.torch_function(torch.log)
X = -jnp.ones(3)


def _module():
    class Root(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sqrt()

    module = Root(3, 2)
    torch.nn.init.constant_(module.weight, 1.0)
    torch.nn.init.zeros_(module.bias)
    return torchleaf.TorchModule(module)


CALLS = {
    "eager": lambda f: f(X),
    "jit": lambda f: jax.jit(lambda x: f(x))(X),
    "jit within": lambda f: jax.jit(lambda x: 2 * jax.jit(lambda x: f(x))(x))(X),
    "vmap": lambda f: jax.vmap(lambda x: f(x))(jnp.stack([X, X])),
    "jit of vmap": lambda f: jax.jit(jax.vmap(lambda x: f(x)))(jnp.stack([X, X])),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(X),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c + f(x), None), jnp.zeros(()), X),
}


@pytest.mark.parametrize("call", [x for name, x in CALLS.items() if name != "jit of grad"])  # that needs no value
def test_a_nan_of_a_function(call):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"invalid value .* encountered in"):
        jax.block_until_ready(call(log))


@pytest.mark.parametrize("name", ["eager", "jit", "grad", "jit of grad"])
def test_a_nan_of_a_module(name):
    model = _module()
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"encountered in .*Root"):
        jax.block_until_ready(CALLS[name](lambda x: model(x)))


def test_an_infinity():
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match=r"encountered in .*log"):
        jax.block_until_ready(jax.jit(lambda x: log(x))(jnp.zeros(3)))


def test_a_nan_of_the_gradient_alone():
    root = torchleaf.torch_function(torch.sqrt)
    with jax.debug_infs(True), jax.debug_nans(True), pytest.raises(FloatingPointError, match="vjp"):
        jax.block_until_ready(jax.grad(lambda x: root(x).sum())(jnp.zeros(3)))


def test_good_values_pass():
    model = _module()
    with jax.debug_nans(True), jax.debug_infs(True):
        assert jnp.isfinite(jax.jit(lambda x: log(x))(-X)).all()
        grads = eqx.filter_jit(eqx.filter_grad(lambda m: m(-X).sum()))(model)
        assert all(jnp.isfinite(leaf).all() for leaf in grads.params.values())
