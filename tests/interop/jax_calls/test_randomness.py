"""Random JAX functions in torch: their keys follow torch's generators."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch.utils.checkpoint import checkpoint


@torchleaf.jax_function
def dropout(x, *, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


@torchleaf.jax_function
def no_random_numbers(x, key=None):
    return x * 2


X = torch.ones(64)


def test_a_seed_repeats():
    torch.manual_seed(3)
    first, second = dropout(X), dropout(X)
    torch.manual_seed(3)
    assert torch.equal(dropout(X), first)
    assert torch.equal(dropout(X), second)
    assert not torch.equal(first, second)
    assert 10 < (first == 0).sum() < 54


def test_an_explicit_generator():
    before = torch.get_rng_state()
    results = [dropout(X, key=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_key_of_jax():
    key = jax.random.key(1)
    expected = jnp.where(jax.random.bernoulli(key, 0.5, (64,)), 2.0, 0)
    assert torch.equal(dropout(X, key=key), torchleaf.to_torch(expected))


def test_a_function_that_makes_no_use_of_its_key_draws_none():
    before = torch.get_rng_state()
    assert torch.equal(no_random_numbers(X), 2 * X)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_program_for_all_keys():
    traces = []

    @torchleaf.jax_function
    def f(x, key):
        traces.append(0)
        return x + jax.random.normal(key, x.shape)

    f(X)
    n = len(traces)
    results = [f(X) for _ in range(3)]
    assert len(traces) == n
    assert not torch.equal(results[0], results[1])


def test_backward_has_the_same_mask():
    x = X.clone().requires_grad_()
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_has_the_same_mask(use_reentrant):
    x = X.clone().requires_grad_()
    y = checkpoint(dropout, x, use_reentrant=use_reentrant)
    dropout(X)  # others are drawn in between
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_vmap():
    batch = torch.ones(4, 64)
    different = torch.func.vmap(dropout, randomness="different")(batch)
    same = torch.func.vmap(dropout, randomness="same")(batch)
    assert len({tuple(row) for row in different.tolist()}) == 4
    assert len({tuple(row) for row in same.tolist()}) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropout)(batch)


def test_gradients_for_each_example_have_its_mask():
    batch = torch.ones(4, 64)
    torch.manual_seed(0)
    masks = torch.func.vmap(dropout, randomness="different")(batch)
    torch.manual_seed(0)
    grads = torch.func.vmap(torch.func.grad(lambda x: dropout(x).sum()), randomness="different")(batch)
    assert torch.equal(grads, masks)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile_draws_in_every_call():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropout(x * 1), backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_()
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(grad, first.detach())
