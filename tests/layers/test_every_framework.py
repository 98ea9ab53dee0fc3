"""`TorchModule` itself, in every framework: which leaf is where, whose memory it is, and what the static part holds."""

import copy
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from compare import assert_trees_close, from_torch
from custom_layers import Channels, TiedAutoencoder
from frameworks import LinenModel, every_framework
from layer_catalogue import SPECS
from module_reference import snapshot, torch_gradients_of, weighted_sum
from torch import nn

pytestmark = [every_framework, pytest.mark.both_engines]


def _mixed() -> nn.Module:
    """Trainable and frozen parameters, buffers, evaluation mode."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module(torch.randn(8, 3))
    module[0].requires_grad_(False)
    return module.eval()


def _tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# --- leaves --------------------------------------------------------------------------------------


def test_leaves_stand_under_torch_names_by_kind(framework):
    weights = framework(_mixed()).weights
    assert set(weights.params) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(weights.frozen) == {"0.weight", "0.bias"}
    assert set(weights.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_leaves_are_the_tensors_of_torch_and_the_static_part_holds_none(framework, spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        model = framework(module)
        assert_trees_close(model.weights.all, from_torch(_tensors(module)), rtol=0, atol=0)
        assert {t.device.type for t in _tensors(model.skeleton).values()} <= {"meta"}


def test_plain_tensor_attributes_stay_in_the_static_part(framework):
    module = nn.Linear(2, 2)
    module.table = torch.arange(3.0)
    assert torch.equal(framework(module).skeleton.table, module.table)


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_leaves_the_module_as_it_was(framework, training):
    module = _mixed().train(training)
    before = snapshot(module)
    assert framework(module).to_torch().training is training
    assert snapshot(module) == before


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 4), _mixed(), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.LSTM(3, 4), Channels(4)],
    ids=["Linear", "mixed", "channels_last", "LSTM", "buffers"],
)
def test_leaves_share_memory_with_torch_unless_copied(framework, module):
    views, copies = framework(module).weights.all, framework(module, copy=True).weights.all
    for name, tensor in _tensors(module).items():
        if tensor.dtype != torch.int64:  # int32 in JAX without x64
            assert views[name].unsafe_buffer_pointer() == tensor.data_ptr(), name
        assert copies[name].unsafe_buffer_pointer() != tensor.data_ptr(), name
    assert_trees_close(copies, views, rtol=0, atol=0)


def test_leaves_are_views_until_an_update(framework):
    """Calls and gradients keep them; a step of training puts others in the place of those it trains, and of no more."""
    module, x = _mixed(), jnp.ones((5, 3))
    tensors, before = _tensors(module), snapshot(module)
    shared = {name for name, t in tensors.items() if t.dtype != torch.int64}

    def views(model):
        return {n for n, x in model.weights.all.items() if x.unsafe_buffer_pointer() == tensors[n].data_ptr()}

    model = framework(module)
    model(x)
    model.gradients(lambda m, x: (m(x).sum(), None), x)
    assert views(model) == shared
    step = model.trainer(optax.adamw(1e-2), lambda m, x: jnp.sum(m(x) ** 2))
    step(x)
    assert not views(model) & model.weights.params.keys()
    assert all(jnp.any(leaf != from_torch(tensors[name])) for name, leaf in model.weights.params.items())
    assert views(framework(module)) == shared
    assert snapshot(module) == before


def test_shared_memory_shows_torch_updates_and_copies_do_not(framework):
    linear = nn.Linear(3, 4)
    view, copied = framework(linear), framework(linear, copy=True)
    x = jnp.ones(3)
    before = copied(x)
    with torch.no_grad():
        linear.weight.add_(1)
    assert_trees_close(view(x), from_torch(linear(torch.ones(3))))
    assert_trees_close(copied(x), before, rtol=0, atol=0)


@pytest.mark.long
def test_leaves_outlive_the_torch_module(framework):
    linear = nn.Linear(300, 400)
    expected = linear.weight.detach().clone().numpy()
    model, gone = framework(linear), weakref.ref(linear)
    weights = model.weights
    del linear
    gc.collect()
    if framework is LinenModel:  # whose `module` is a field
        del model
        gc.collect()
    torch.randn(400, 300)  # would reuse freed memory
    assert gone() is None
    np.testing.assert_array_equal(weights.params["weight"], expected)


# --- tied weights --------------------------------------------------------------------------------


def test_tied_weights_are_one_leaf_with_the_sum_of_gradients(framework):
    module, ids = TiedAutoencoder(5, 3), torch.tensor([0, 3, 3, 1])
    model = framework(module)
    assert set(model.weights.params) == {"embed.weight", "project.bias"}
    moved = model.replaced({"embed.weight": model.weights.params["embed.weight"] + 1})
    with torch.no_grad():
        changed = copy.deepcopy(module)
        changed.embed.weight += 1
    assert_trees_close(moved(from_torch(ids)), from_torch(changed(ids)))

    def loss(model):
        return weighted_sum(model(from_torch(ids))), None

    expected, _ = torch_gradients_of(module, module, (ids,), {})
    grads = model.jit(lambda m: m.gradients(loss))().weights.params
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-5)
    untied = copy.deepcopy(module)
    untied.project.weight = nn.Parameter(untied.project.weight.detach().clone())
    each = framework(untied).gradients(loss).weights.params
    assert_trees_close(grads["embed.weight"], each["embed.weight"] + each["project.weight"], rtol=1e-4)
