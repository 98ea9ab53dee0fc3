"""Hooks that change gradients do so in a batch by `jax.vmap` as they do in torch, where torch.func.vmap has none."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch

pytestmark = pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")


class TensorHook(torch.nn.Module):
    """A hook on what is computed within."""

    def forward(self, x):
        y = x.tanh()
        if y.requires_grad:
            y.register_hook(lambda g: 0.5 * g)
        return y


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is scaled: gradient reversal, as domain adaptation uses it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Reversal(torch.nn.Module):
    def forward(self, x):
        return Scaled.apply(x.tanh())


def hook_output(module, args, y):
    if y.requires_grad:
        y.register_hook(lambda g: 3 * g)


def with_hook(register):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    register(module[1])
    return module


MODULES = {
    "full backward hook": lambda: with_hook(
        lambda m: m.register_full_backward_hook(lambda m, grad_in, grad_out: (0.5 * grad_in[0],))
    ),
    "full backward pre-hook": lambda: with_hook(
        lambda m: m.register_full_backward_pre_hook(lambda m, grad_out: (2 * grad_out[0],))
    ),
    "tensor hook": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), TensorHook(), torch.nn.Linear(4, 1)),
    "forward hook that hooks its output": lambda: with_hook(lambda m: m.register_forward_hook(hook_output)),
    "forward pre-hook": lambda: with_hook(lambda m: m.register_forward_pre_hook(lambda m, args: (2 * args[0],))),
    "gradient reversal": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), Reversal(), torch.nn.Linear(4, 1)),
}


def torch_gradients(module, x):
    """The gradients of a loss by the weights, by torch."""
    names, weights = zip(*module.named_parameters(), strict=True)
    return from_torch(dict(zip(names, torch.autograd.grad((module(x) ** 2).sum(), weights), strict=True)))


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_gradients_of_a_batch(make, residuals, jit):
    module = make()
    model = torchleaf.TorchModule(module, residuals=residuals)
    x = jnp.arange(15.0).reshape(5, 3) / 15
    summed = jit(lambda params: gradients(model, params, lambda m: jnp.sum(jax.vmap(m)(x) ** 2)))
    assert_trees_close(summed(model.params), torch_gradients(module, torchleaf.to_torch(x)), rtol=1e-4, atol=1e-5)
    each = jit(lambda params: jax.vmap(lambda x: gradients(model, params, lambda m: jnp.sum(m(x) ** 2)))(x))
    one_by_one = [torch_gradients(module, torchleaf.to_torch(row)) for row in x]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *one_by_one)
    assert_trees_close(each(model.params), expected, rtol=1e-4, atol=1e-5)


def gradients(model, params, loss):
    return jax.grad(lambda params: loss(eqx.tree_at(lambda m: m.params, model, params)))(params)
