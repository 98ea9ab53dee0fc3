"""Hooks of parameters change the gradients of a call as they change torch's, in every transform."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch, repeated_jit
from frameworks import every_framework
from module_reference import torch_gradients_of, torch_weighted_sum, weighted_sum
from torch import nn
from torchleaf import TorchModule
from untouched import unchanged

X = torch.linspace(-1.5, 2, 12).reshape(4, 3)


def _linear(*hooks):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    for hook in hooks:
        module[0].weight.register_hook(hook)
    return module


def _masked():
    mask = torch.tensor([[1.0], [0.0], [2.0]])
    return _linear(lambda grad: grad * mask)


def _clipped():
    return _linear(lambda grad: grad.clamp(-0.1, 0.1))


def _several():
    seen = []
    return _linear(lambda grad: seen.append(grad.shape), lambda grad: grad * 2, lambda grad: grad + 1)


def _of_itself():
    """Reads another parameter of the module."""
    module = _linear()
    module[0].weight.register_hook(lambda grad: grad * module[0].bias.detach())
    return module


def _tied():
    module = _masked()
    module.append(nn.Linear(2, 3))
    module.append(nn.Linear(3, 3))
    module[4].weight = module[0].weight
    return module


def _embedding():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].weight.register_hook(lambda grad: grad / (grad.norm() + 1))
    module[1].bias.register_hook(torch.zeros_like)
    return module


MODULES = {
    "mask": _masked,
    "clip": _clipped,
    "several": _several,
    "of itself": _of_itself,
    "tied": _tied,
    "normalised": _embedding,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@every_module
@every_framework
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients(framework, make, residuals):
    module, x = make(), from_torch(X)
    model = framework(module, residuals=residuals)
    with unchanged(model.weights, torch_module=module):
        assert_trees_close(model(x), from_torch(module(X)))
        gradients = model.gradients(lambda m, x: (weighted_sum(m(x)), None), x)
    weights, (inputs,) = torch_gradients_of(module, module, (X,), {})
    assert_trees_close(gradients.weights.params, weights)
    assert_trees_close(gradients.inputs[0], inputs)


def _loss(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: weighted_sum(eqx.combine(p, static)(x))


@every_module
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_compiled_gradients(make, residuals):
    module, x = make(), from_torch(X)
    params, loss = _loss(TorchModule(module, residuals=residuals))
    expected, _ = torch_gradients_of(module, module, (X,), {})
    assert_trees_close(repeated_jit(jax.grad(loss))(params, x).params, expected)


@pytest.mark.long
@every_module
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
def test_batches(make):
    """Each example's gradient goes through the hooks by itself, also where they are summed."""
    module, x = make(), from_torch(X)
    params, loss = _loss(TorchModule(module))
    expected = [torch_gradients_of(module, module, (row,), {})[0] for row in X]
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, x)
    for i, of_one in enumerate(expected):
        assert_trees_close({name: leaf[i] for name, leaf in each.params.items()}, of_one)
    summed = jax.grad(lambda p: jax.vmap(loss, in_axes=(None, 0))(p, x).sum())(params)
    assert_trees_close(summed.params, {name: sum(of_one[name] for of_one in expected) for name in expected[0]})


@pytest.mark.long
@pytest.mark.parametrize("make", [_masked, _of_itself], ids=["mask", "of itself"])
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
def test_second_derivatives(make):
    """Of a hooked gradient, as torch's double backward has it."""
    module, x = make(), from_torch(X)
    params, loss = _loss(TorchModule(module))

    def norm(p):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(p, x)))

    torch_params = dict(module.named_parameters())
    grads = torch.autograd.grad(torch_weighted_sum(module(X)), list(torch_params.values()), create_graph=True)
    expected = torch.autograd.grad(sum((g**2).sum() for g in grads), list(torch_params.values()), allow_unused=True)
    found = jax.grad(norm)(params).params
    for (name, p), g in zip(torch_params.items(), expected, strict=True):
        assert_trees_close(found[name], from_torch(torch.zeros_like(p) if g is None else g), rtol=1e-4, atol=1e-5)


def test_a_hook_goes_back_to_torch():
    module = _masked()
    back = torchleaf.to_torch_module(TorchModule(module))
    assert_trees_close(torch_gradients_of(back, back, (X,), {})[0], torch_gradients_of(module, module, (X,), {})[0])


@pytest.mark.long
def test_a_training_step_keeps_a_masked_row():
    module, x = _masked(), from_torch(X)
    params, loss = _loss(TorchModule(module))
    before = params.params["0.weight"]

    @jax.jit
    def step(params):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    for _ in range(5):
        params = step(params)
    moved = jnp.abs(params.params["0.weight"] - before).max(1)
    assert moved[1] == 0
    assert (moved[0] > 0) & (moved[2] > 0)
