"""Every layer of the catalogue gives in JAX what it gives in torch: values, structure, dtypes, gradients, batches.

Compiled gradients, and with them outputs, are those of every layer in every framework. What does not depend on the
framework, because it happens in the call that all of them share, runs for every layer in Equinox; for the others a few
layers stand for all: one of each way to hold weights and of each path through the call.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch
from frameworks import FRAMEWORKS, EquinoxModel, Model, eager_and_jit
from layer_catalogue import SPECS, LayerSpec, looped
from module_reference import snapshot, torch_gradients_of, weighted_sum

# torch says so once per process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.both_engines(every=4),  # each layer in Equinox: interop/xla/test_engine_layers.py
]

_FEW = {
    *("Linear-frozen", "Embedding", "Conv2d-channels_last", "BatchNorm2d", "MultiheadAttention", "LSTM"),
    *("spectral_norm-hook", "tied-weights", "shared-submodule", "writes-into-its-input", "ParameterList-ParameterDict"),
    *("Sequential-ModuleList", "buffers", "no-parameters", "complex64", "float64", "bfloat16"),
}


@dataclass
class Layer:
    """A layer in both worlds."""

    spec: LayerSpec
    module: torch.nn.Module
    model: Model

    def assert_close(self, actual: Any, expected: Any) -> None:
        tolerance = self.spec.tolerance
        assert_trees_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def layer(request, engine):
    """A layer; whatever a test does with the model, the torch module must afterwards be as it was."""
    framework, spec = request.param
    if engine == "xla":
        spec = replace(spec, tolerance=max(spec.tolerance, 2e-5))
    with jax.enable_x64(spec.x64):
        module = spec.make()
        before = snapshot(module)
        yield Layer(spec, module, framework(module, **spec.options))
        assert snapshot(module) == before


def _layers(*, few_in_flax):
    cases = [(f, s) for f in FRAMEWORKS for s in SPECS if f is EquinoxModel or s.name in _FEW or not few_in_flax]
    return pytest.mark.parametrize("layer", cases, indirect=True, ids=[f"{f.name}-{s.name}" for f, s in cases])


every_layer, every_layer_but_few_in_flax = _layers(few_in_flax=False), _layers(few_in_flax=True)


@pytest.mark.torch_engine  # about this file
def test_the_few_are_in_the_catalogue():
    assert {spec.name for spec in SPECS} >= _FEW


@every_layer_but_few_in_flax
@eager_and_jit
def test_output(layer, jit):
    args, kwargs = layer.spec.draw()
    inputs, untouched = from_torch((args, kwargs)), from_torch((args, kwargs))
    actual = layer.model.maybe_jit(lambda m, a, k: m(*a, **k), jit=jit)(*inputs)
    layer.assert_close(actual, from_torch(layer.module(*args, **kwargs)))
    assert_trees_close(inputs, untouched, rtol=0, atol=0)


def _loss(model, args, kwargs):
    outputs = model(*args, **kwargs)
    return weighted_sum(outputs), outputs


@every_layer_but_few_in_flax
def test_gradients(layer):
    args, kwargs = layer.spec.draw()
    grads = layer.model.gradients(_loss, *from_torch((args, kwargs)))
    _assert_gradients(layer, grads, layer.module, args, kwargs)


@every_layer
def test_compiled_gradients(layer):
    args, kwargs = layer.spec.draw()
    grads = layer.model.jit(lambda m, *inputs: m.gradients(_loss, *inputs))(*from_torch((args, kwargs)))
    _assert_gradients(layer, grads, layer.module, args, kwargs)


@pytest.mark.long
@every_layer_but_few_in_flax
def test_vmap_and_its_gradients(layer, engine):
    """Over all inputs at once, against a loop in torch; gradients of the weights are summed over the batch."""
    args, kwargs = layer.spec.draw_batch(3)

    def loss(model, args, kwargs):
        outputs = model.vmap(lambda m, a, k: m(*a, **k))(args, kwargs)
        return weighted_sum(outputs), outputs

    loops = layer.spec.loops and engine == "torch"
    with pytest.warns(UserWarning, match="runs as a loop") if loops else contextlib.nullcontext():
        grads = layer.model.jit(lambda m, *inputs: m.gradients(loss, *inputs))(*from_torch((args, kwargs)))
    _assert_gradients(layer, grads, looped(layer.module, 3), args, kwargs)


def _assert_gradients(layer, grads, function, args, kwargs):
    """Those of torch, outputs too; none of frozen parameters and buffers."""
    layer.assert_close(grads.aux, from_torch(function(*args, **kwargs)))
    expected = torch_gradients_of(function, layer.module, args, kwargs)
    layer.assert_close((grads.weights.params, grads.inputs), expected)
    assert not any(jnp.any(g) for g in jax.tree.leaves((grads.weights.frozen, grads.weights.buffers)))
