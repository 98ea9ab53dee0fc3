"""Training with optax is training with torch.optim, step by step; what is not trainable stays bit for bit."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from torch import nn

STEPS = 20


def _network() -> nn.Module:
    """A frozen layer, running statistics and two trainable layers; in evaluation mode."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    module(2 * torch.randn(32, 6) + 1)
    module[0].requires_grad_(False)
    return module.eval()


def _batches(rng):
    return [
        (jnp.asarray(rng.normal(size=(16, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, 16), jnp.int32))
        for _ in range(STEPS)
    ]


OPTIMIZERS = {
    "sgd-momentum": (lambda: optax.sgd(0.1, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
    "adamw": (
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    ),
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def trained(request, rng):
    """The initial model, the model trained by optax, the module trained by torch, and both loss curves."""
    make_optax, make_torch = request.param
    module = _network()
    initial = torchleaf.TorchModule(module, copy=True)
    model, optimizer = initial, make_optax()
    opt_state = optimizer.init(eqx.filter(model, torchleaf.trainable(model)))

    @eqx.filter_jit
    def step(model, opt_state, x, labels):
        params, static = eqx.partition(model, torchleaf.trainable(model))

        def loss(params):
            logits = eqx.combine(params, static)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, value

    torch_optimizer = make_torch([p for p in module.parameters() if p.requires_grad])
    losses, torch_losses = [], []
    for x, labels in _batches(rng):
        model, opt_state, value = step(model, opt_state, x, labels)
        losses.append(value)
        torch_optimizer.zero_grad()
        expected = nn.functional.cross_entropy(module(torch.tensor(x.tolist())), torch.tensor(labels.tolist()))
        expected.backward()
        torch_optimizer.step()
        torch_losses.append(from_torch(expected))
    return initial, model, module, jnp.stack(losses), jnp.stack(torch_losses)


def test_losses_and_weights_agree_with_torch_optim(trained):
    initial, model, module, losses, torch_losses = trained
    assert_trees_close(losses, torch_losses, rtol=1e-4, atol=1e-5)
    assert losses[-1] != losses[0]
    expected = {name: from_torch(p) for name, p in module.named_parameters() if p.requires_grad}
    assert_trees_close(model.params, expected, rtol=1e-3, atol=1e-4)
    assert all(jnp.any(model.params[name] != initial.params[name]) for name in expected)


def test_frozen_parameters_and_buffers_are_bit_identical_after_training(trained):
    initial, model, *_ = trained
    assert_trees_close((model.frozen, model.buffers), (initial.frozen, initial.buffers), rtol=0, atol=0)


def test_weight_decay_would_have_changed_them():
    """Without `trainable`, adamw decays what has no gradient: why the recipe names it."""
    model = torchleaf.TorchModule(_network())
    params = eqx.filter(model, eqx.is_inexact_array)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert jnp.any(eqx.apply_updates(params, updates).frozen["0.weight"] != params.frozen["0.weight"])


def test_training_does_not_touch_the_wrapped_module(rng):
    """Its weights are views of the first model's leaves, and an update makes new leaves."""
    module = _network()
    before = copy.deepcopy(module.state_dict())
    model = torchleaf.TorchModule(module)
    x, _ = _batches(rng)[0]
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: (m(x) ** 2).sum()))(model)
    updated = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, eqx.filter(grads, torchleaf.trainable(model))))
    assert jnp.any(updated.params["5.bias"] != model.params["5.bias"])
    assert_trees_close(from_torch(module.state_dict()), from_torch(before), rtol=0, atol=0)
