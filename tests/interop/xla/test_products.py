"""Products of matrices that torch has expanded or transposed, of which JAX takes the matrix itself."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch


@pytest.mark.long
def test_an_expanded_matrix_is_multiplied_once():
    """Where an operand does not lie in memory in order, torch makes a batch of products of a linear layer."""
    weight = torch.randn(5, 4)

    def fn(x, w):
        by_linear = torch.nn.functional.linear(x.transpose(0, 1), w)
        return by_linear + torch.baddbmm(by_linear, x.transpose(0, 1), w.t().expand(3, 4, 5)), w @ x.transpose(1, 2)

    x, ours = jnp.linspace(-1, 1, 24).reshape(2, 3, 4), torchleaf.torch_function(fn, engine="xla", strict=True)
    w = from_torch(weight)
    products = [line for line in str(jax.make_jaxpr(ours)(x, w)).splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert not any("[3,4,5]" in line for line in products)
    assert_trees_close(ours(x, w), torchleaf.torch_function(fn)(x, w))

    def gradients(f):
        return jax.grad(lambda x, w: sum(jnp.sum(jnp.sin(y)) for y in f(x, w)), (0, 1))(x, w)

    assert_trees_close(gradients(ours), gradients(torchleaf.torch_function(fn)), rtol=1e-4, atol=1e-5)


def test_an_expanded_matrix_that_is_written_into_before_is_its_new_value():
    def fn(x, w):
        v = w.clone()
        expanded = v.t().expand(3, 4, 5)
        v.mul_(2)
        return torch.bmm(x, expanded)

    x, w = jnp.linspace(-1, 1, 24).reshape(3, 2, 4), jnp.linspace(0, 1, 20).reshape(5, 4)
    assert_trees_close(torchleaf.torch_function(fn, engine="xla")(x, w), torchleaf.torch_function(fn)(x, w))


def _stopped(x, w):
    with torch.no_grad():
        turned = w.t()
    return x @ turned + torch.addmm(x[0, :1], x, w.t())


TRANSPOSED = {
    "linear": torch.nn.functional.linear,
    "addmm": lambda x, w: torch.addmm(x[0, :1], x, w.t(), beta=2, alpha=3),
    "swapped": lambda x, w: x @ w.swapaxes(0, -1) + x @ w.mT,
    "permuted": lambda x, w: x @ w.permute(-1, 0),
    "batches": lambda x, w: (x[None] * w[:, None]) @ (w[:, None] + x).transpose(1, 2),
    "baddbmm": lambda x, w: torch.baddbmm(x[:1, :1, None], x[None], w[None].mT),
    "expanded": lambda x, w: torch.bmm(x.expand(3, 6, 4), w.t().expand(3, 4, 5)),
    "one of a batch": lambda x, w: torch.bmm(x.expand(3, 6, 4), w[None].mT.expand(3, 4, 5)),
    "the other expanded": lambda x, w: torch.bmm(x.expand(5, 6, 4), (w[:, None] + w).mT),
    "both": lambda x, w: w @ x.t(),
}


each_product = pytest.mark.parametrize("fn", [*TRANSPOSED.values(), _stopped], ids=[*TRANSPOSED, "stopped"])


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64, jnp.int32])
@each_product
def test_transposed_matrices_in_other_dtypes(fn, dtype):
    _check(fn, dtype)


@pytest.mark.long
@pytest.mark.all_cases
@each_product
def test_transposed_matrices_are_contracted(fn):
    """Other axes of them are, so that there is no transposition for XLA to carry out."""
    _check(fn, jnp.float32)


def _check(fn, dtype):
    x, w = (4 * jax.random.normal(jax.random.key(n), (n, 4)) for n in (6, 5))
    x, w = x.astype(dtype), w.astype(dtype)
    ours, by_torch = torchleaf.torch_function(fn, engine="xla", strict=True), torchleaf.torch_function(fn)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype != jnp.bfloat16 else {"rtol": 2e-2, "atol": 2e-1}
    assert_trees_close(ours(x, w), by_torch(x, w), **close)
    assert_trees_close(jax.vmap(ours, (0, None))(x[None], w), by_torch(x, w)[None], **close)
    n_needed = {_stopped: 1, TRANSPOSED["the other expanded"]: 2}
    assert str(jax.make_jaxpr(ours)(x, w)).count("transpose[") == n_needed.get(fn, 0)
    if dtype == jnp.int32:
        return

    def gradients(f):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(jnp.abs(f(x, w)))), (0, 1))(x, w)

    assert_trees_close(gradients(ours), gradients(by_torch), **{k: 10 * v for k, v in close.items()})
