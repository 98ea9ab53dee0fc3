"""Training in every framework is training in torch, step by step; what is not trainable stays bit for bit."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import TiedAutoencoder
from frameworks import eager_and_jit, every_framework
from module_reference import snapshot, torch_gradients_of, weighted_sum
from stateful_layers import UPDATES, MovingAverage, assert_as_torch, assert_equal, buffers_of, by_torch, some
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
STEPS = 20


def _loss(model, *inputs):
    output = model(*inputs)
    return weighted_sum(output), output


# --- state ---------------------------------------------------------------------------------------


@every_framework
@some
@eager_and_jit
def test_state_is_torchs_bit_for_bit_after_each_step(framework, spec, jit, engine):
    module, inputs = spec.make(), spec.inputs(4)
    before = snapshot(module)
    model = framework(module, with_state=True)
    step = model.maybe_jit(lambda m, x: m(x), jit=jit)
    outputs = []
    for i, x in enumerate(inputs):
        outputs.append(step(from_torch(x)))
        expected, buffers = by_torch(module, inputs[: i + 1])
        assert_as_torch(engine, (outputs, model.weights.buffers), (expected, buffers))
    assert snapshot(module) == before


@every_framework
@some
@eager_and_jit
def test_gradients_and_state_of_one_step(framework, spec, jit):
    module, (x,) = spec.make(), spec.inputs(1)
    model = framework(module, with_state=True, copy=True)
    grads = model.maybe_jit(lambda m, x: m.gradients(_loss, x), jit=jit)(from_torch(x))
    expected = torch_gradients_of(module, module, (x,), {})
    assert_trees_close((grads.weights.params, grads.inputs), expected, rtol=1e-4, atol=1e-4)
    assert not any(jnp.any(g) for g in grads.weights.buffers.values())
    assert_trees_close(model.weights.buffers, buffers_of(module))


@every_framework
def test_no_gradient_flows_through_state(framework):
    model = framework(MovingAverage(3, UPDATES["reassigned"]), with_state=True)

    def second(model, a, b):
        model(a)
        return weighted_sum(model(b)), None

    grads = model.jit(lambda m, a, b: m.gradients(second, a, b))(2 * jnp.ones((4, 3)), jnp.ones((4, 3)))
    assert not jnp.any(grads.inputs[0])
    assert jnp.all(grads.inputs[1])


@every_framework
def test_evaluation_mode_uses_the_statistics_and_keeps_them(framework):
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    training = framework(module, with_state=True)
    training(5 * jnp.ones((4, 3)) + jnp.arange(3.0))
    evaluating = training.in_mode(training=False)
    before = evaluating.weights.buffers
    y = evaluating.jit(lambda m, x: m(x))(jnp.ones((2, 3)))
    assert_trees_close(y, from_torch(evaluating.to_torch()(torch.ones(2, 3))))
    assert_equal(evaluating.weights.buffers, before)
    assert not evaluating.to_torch().training


# --- optimizers ----------------------------------------------------------------------------------


def _network(*, training: bool) -> nn.Module:
    """A frozen layer, running statistics, another buffer and two trainable layers."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    module(2 * torch.randn(32, 6) + 1)
    module[0].requires_grad_(False)
    module.register_buffer("constant", torch.randn(4))
    return module.train(training)


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


@every_framework
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("make_optax", "make_torch"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_losses_and_weights_agree_with_torch_optim(framework, training, make_optax, make_torch, rng):
    """By the recipe of the documentation; frozen parameters and constant buffers stay bit for bit."""
    module = _network(training=training)
    model = framework(module, with_state=True, copy=True)
    initial, traces = model.weights, []

    def loss(model, x, labels):
        traces.append(1)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    step = model.trainer(make_optax(), loss)
    optimizer = make_torch([p for p in module.parameters() if p.requires_grad])
    losses, expected_losses = [], []
    for x, labels in _batches(rng):
        losses.append(step(x, labels))
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(module(torch.tensor(x.tolist())), torch.tensor(labels.tolist()))
        expected.backward()
        optimizer.step()
        expected_losses.append(from_torch(expected))
    assert len(traces) == 1
    assert_trees_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    assert losses[-1] != losses[0]
    trained = model.weights
    expected = {name: from_torch(p) for name, p in module.named_parameters() if p.requires_grad}
    assert_trees_close(trained.params, expected, rtol=1e-3, atol=1e-4)
    assert all(jnp.any(trained.params[name] != initial.params[name]) for name in expected)
    assert_equal(trained.frozen, initial.frozen)
    assert_equal(trained.buffers["constant"], initial.buffers["constant"])
    if training:
        assert_trees_close(trained.buffers, buffers_of(module), rtol=1e-4, atol=1e-5)
    else:
        assert_equal(trained.buffers, initial.buffers)


@pytest.mark.long
def test_weight_decay_would_have_changed_what_is_frozen():
    """In Equinox, without `trainable`, adamw decays what has no gradient: why the recipe names it."""
    params = eqx.filter(torchleaf.TorchModule(_network(training=False)), eqx.is_inexact_array)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert jnp.any(eqx.apply_updates(params, updates).frozen["0.weight"] != params.frozen["0.weight"])


@every_framework
def test_tied_weights_stay_tied_through_training(framework):
    """Adam with weight decay steps a tied weight once, as torch's does."""
    module, ids = TiedAutoencoder(5, 3), torch.tensor([0, 3, 3, 1])
    model = framework(module, copy=True)
    step = model.trainer(optax.adamw(0.1, weight_decay=0.1), lambda m, ids: jnp.mean(m(ids) ** 2))
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.1)
    for _ in range(5):
        step(from_torch(ids))
        optimizer.zero_grad()
        module(ids).square().mean().backward()
        optimizer.step()
    expected = {name: from_torch(p) for name, p in module.named_parameters()}
    assert_trees_close(model.weights.params, expected, rtol=1e-4, atol=1e-4)
    exported = model.to_torch()
    assert exported.project.weight is exported.embed.weight


@every_framework
def test_training_does_not_touch_the_wrapped_module(framework, rng):
    """Its weights are views of the first model's leaves, and an update makes new leaves."""
    module = _network(training=True)
    before = copy.deepcopy(module.state_dict())
    model = framework(module, with_state=True)
    x, _ = _batches(rng)[0]
    model.trainer(optax.sgd(0.1), lambda m, x: jnp.sum(m(x) ** 2))(x)
    changed = {"2.running_mean", "2.running_var", "2.num_batches_tracked", "5.bias"}
    assert all(jnp.any(model.weights.all[name] != from_torch(before[name])) for name in changed)
    assert_equal(from_torch(dict(module.state_dict())), from_torch(dict(before)))
