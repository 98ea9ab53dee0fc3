"""Channels last in Linen models: as Flax's own layers have them, and by views."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from linen_models import by_torch_name, normal, tensors
from torch import nn as tnn
from torch._subclasses.fake_tensor import FakeTensor

pytestmark = pytest.mark.both_engines(every=4)
TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


def test_conv_of_flax_computes_the_same(rng):
    x = normal(rng, 2, 8, 9, 3)
    model, conv = TorchModule(tnn.Conv2d(3, 4, 3, padding=1), channels_last=True), nn.Conv(4, (3, 3))
    variables = model.init(KEY, x)
    theirs = {"kernel": variables["params"]["weight"].transpose(2, 3, 1, 0), "bias": variables["params"]["bias"]}
    expected = conv.apply({"params": theirs}, x)
    assert expected.shape == (2, 8, 9, 4)
    assert_trees_close(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def _cnn() -> tnn.Module:
    return tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.BatchNorm2d(8), tnn.ReLU(), tnn.MaxPool2d(2), tnn.Conv2d(8, 4, 3))


@eager_and_jit
def test_a_batch_norm_network_trains_channels_last_as_in_torch(jit):
    module = _cnn()
    model = TorchModule(copy.deepcopy(module), channels_last=True, copy_weights=True)
    variables = model.init(KEY, jnp.zeros((2, 12, 12, 3)))

    def loss(params, rest, x):
        y, updates = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        return jnp.mean(y**2), (y, updates)

    step = jit(jax.value_and_grad(loss, has_aux=True))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12)
        (_, (y, rest)), grads = step(params, rest, from_torch(x.movedim(1, -1)))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        expected = module(x)
        optimizer.zero_grad()
        expected.square().mean().backward()
        optimizer.step()
        assert_trees_close(y, from_torch(expected.movedim(1, -1)), rtol=1e-4, atol=1e-4)
    trained = by_torch_name({"params": params, **rest})
    assert_trees_close(trained, from_torch(tensors(module)), rtol=1e-4, atol=1e-4)


@pytest.mark.torch_engine  # memory
def test_torch_sees_views_in_its_layout():
    seen = []

    class Look(tnn.Module):
        def forward(self, image: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, ids: torch.Tensor):
            contiguous = image.is_contiguous(memory_format=torch.channels_last)
            pointer = None if isinstance(image, FakeTensor) else image.data_ptr()
            seen.append((contiguous, image.shape, pointer, mask.shape, row.shape, ids.shape))
            return image, ids

    model = TorchModule(Look(), channels_last=True)
    image, mask = jnp.zeros((2, 5, 6, 3)), jnp.ones((5, 6, 3), bool)
    y, ids = jax.jit(lambda *args: model.apply({}, *args))(image, mask, jnp.ones((2, 7)), jnp.ones((2, 3, 4), int))
    assert (y.shape, ids.shape) == ((2, 5, 6, 3), (2, 3, 4))
    contiguous, shape, pointer, *others = seen[-1]
    assert contiguous
    assert shape == (2, 3, 5, 6)
    assert pointer == image.unsafe_buffer_pointer()
    assert others == [(5, 6, 3), (2, 7), (2, 3, 4)]


def test_channels_last_under_vmap(rng):
    module, x = _cnn().eval(), normal(rng, 3, 4, 12, 12, 3)
    model = TorchModule(module, channels_last=True)
    variables = model.init(KEY, x[0])
    outputs = jax.vmap(lambda x: model.apply(variables, x))(x)
    assert_trees_close(outputs, jnp.stack([model.apply(variables, row) for row in x]), rtol=1e-4, atol=1e-5)
