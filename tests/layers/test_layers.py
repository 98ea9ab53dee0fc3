"""Every layer of the catalogue gives in JAX what it gives in torch: values, structure, dtypes, gradients, batches."""

import contextlib
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from layer_catalogue import SPECS, LayerSpec
from module_reference import eager_and_filter_jit, snapshot, torch_gradients_of, weighted_sum

# torch says so once per process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@dataclass
class Layer:
    """A layer in both worlds."""

    spec: LayerSpec
    module: torch.nn.Module
    model: torchleaf.TorchModule

    def assert_close(self, actual: Any, expected: Any) -> None:
        tolerance = self.spec.tolerance
        assert_trees_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def layer(request):
    """A layer; whatever a test does with the model, the torch module must afterwards be as it was."""
    spec = request.param
    with jax.enable_x64(spec.x64):
        module = spec.make()
        before = snapshot(module)
        yield Layer(spec, module, torchleaf.TorchModule(module))
        assert snapshot(module) == before


@eager_and_filter_jit
def test_output(layer, jit):
    args, kwargs = layer.spec.draw()
    inputs, untouched = from_torch((args, kwargs)), from_torch((args, kwargs))
    actual = jit(lambda m, a, k: m(*a, **k))(layer.model, *inputs)
    layer.assert_close(actual, from_torch(layer.module(*args, **kwargs)))
    assert_trees_close(inputs, untouched, rtol=0, atol=0)


@eager_and_filter_jit
def test_gradients(layer, jit):
    args, kwargs = layer.spec.draw()

    def loss(inputs):
        model, args, kwargs = inputs
        return weighted_sum(model(*args, **kwargs))

    grads = jit(eqx.filter_grad(loss))((layer.model, *from_torch((args, kwargs))))
    _assert_gradients(layer, grads, torch_gradients_of(layer.module, layer.module, args, kwargs))


def test_vmap_and_its_gradients(layer):
    """Over all inputs at once, against a loop in torch; gradients of the weights are summed over the batch."""
    args, kwargs = jax.tree.map(_stack, *(layer.spec.draw() for _ in range(3)))

    def loss(inputs):
        model, args, kwargs = inputs
        outputs = eqx.filter_vmap(lambda a, k: model(*a, **k))(args, kwargs)
        return weighted_sum(outputs), outputs

    def loop(*args, **kwargs):
        rows = [jax.tree.map(lambda x: _row(x, i), (args, kwargs)) for i in range(3)]
        return jax.tree.map(_stack, *(layer.module(*a, **k) for a, k in rows))

    expectation = pytest.warns(UserWarning, match="runs as a loop") if layer.spec.loops else contextlib.nullcontext()
    with expectation:
        grads, outputs = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((layer.model, *from_torch((args, kwargs))))
    layer.assert_close(outputs, from_torch(loop(*args, **kwargs)))
    _assert_gradients(layer, grads, torch_gradients_of(loop, layer.module, args, kwargs))


def _assert_gradients(layer, grads, expected):
    model_grads, *input_grads = grads
    layer.assert_close((model_grads.params, jax.tree.leaves(input_grads)), expected)
    assert not any(jnp.any(g) for g in jax.tree.leaves((model_grads.frozen, model_grads.buffers)))


def _stack(first, *others):
    return torch.stack([first, *others]) if isinstance(first, torch.Tensor) else first


def _row(leaf, i):
    return leaf[i].clone() if isinstance(leaf, torch.Tensor) else leaf
