"""64-bit integers that a function returns are JAX's, or an error: never others."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf

big = torchleaf.torch_function(lambda x: x.long() * 2**33)
fits = torchleaf.torch_function(lambda x: {"index": x.argmax(), "rank": x.argsort(), "count": (x > 0).sum()})
X = jnp.array([1, 2])

CALLS = {
    "eager": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(lambda x: f(x))(x),
    "vmap": lambda f, x: jax.vmap(lambda x: f(x))(x),
    "jit of vmap": lambda f, x: jax.jit(jax.vmap(lambda x: f(x)))(x),
    "scan": lambda f, x: jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1])(x),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_too_large(call):
    with pytest.raises(Exception, match=r"int64 values that do not fit int32(.|\n)*jax_enable_x64"):
        jax.block_until_ready(call(big, X))


@every_call
def test_the_largest_and_the_smallest_pass(call):
    limits = torchleaf.torch_function(lambda x: (x - 1) * 2**31 - (x - 1).sign())
    assert call(limits, jnp.array([2])).tolist() == [2**31 - 1]
    negative = torchleaf.torch_function(lambda x: x * -(2**31))
    assert call(negative, jnp.array([1])).tolist() == [-(2**31)]


def test_at_every_run():
    """Programs run many times; the values of each run count."""
    step = jax.jit(torchleaf.torch_function(lambda x: x.long() * 2**20))
    for value in (1, 2, 3, 4):
        assert step(jnp.array([value])).tolist() == [value * 2**20]
    with torch.no_grad():
        assert step(jnp.array([5])).tolist() == [5 * 2**20]


def test_indices_are_as_before():
    x = jnp.array([0.5, -1.0, 2.0])
    for call in CALLS.values():
        out = call(fits, x[None] if call in (CALLS["vmap"], CALLS["jit of vmap"], CALLS["scan"]) else x)
        assert {v.dtype for v in out.values()} == {jnp.dtype("int32")}
    assert jnp.array_equal(fits(x)["rank"], jnp.argsort(x))


def test_x64_has_them_all(x64):
    assert big(X).tolist() == [2**33, 2**34]


def test_of_a_module():
    class Hash(torch.nn.Module):
        def forward(self, x):
            return x.long() * 1_000_003 * 10_007

    with pytest.raises(Exception, match="Hash returns int64 values that do not fit"):
        jax.block_until_ready(torchleaf.TorchModule(Hash())(X))
