"""Models of each framework with torch layers, exported: they run in a process without torch, with gradients."""

import pickle
import subprocess
import sys

import equinox as eqx
import flax.linen
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from flax import nnx

pytestmark = pytest.mark.all_cases
XLA = {"engine": "xla", "strict": True}


def _convolutions():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(72, 4)
    ).eval()


# Each gives the parameters of a model and what it is of them: a torch layer, and one of the framework's.


def _equinox(layer):
    class Model(eqx.Module):
        layer: torchleaf.TorchModule
        head: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(self.head)(self.layer(x))

    model = Model(torchleaf.TorchModule(layer, **XLA), eqx.nn.Linear(4, 3, key=jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: eqx.combine(params, static)(x)


def _linen(layer):
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Dense(3)(torchleaf.linen.TorchModule(layer, **XLA)(x))

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((1, 1, 8, 8)))
    rest = {name: x for name, x in variables.items() if name != "params"}
    return variables["params"], lambda params, x: model.apply({"params": params, **rest}, x)


def _nnx(layer):
    class Model(nnx.Module):
        def __init__(self):
            self.layer = torchleaf.nnx.TorchModule(layer, **XLA)
            self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.layer(x))

    definition, params, rest = nnx.split(Model(), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(definition, params, rest)(x)


FRAMEWORKS = {"equinox": _equinox, "linen": _linen, "nnx": _nnx}


def _flat(make):
    """A loss and the output of a model, as functions of its leaves and of a batch."""
    params, apply = make(_convolutions())
    leaves, treedef = jax.tree.flatten(params)

    def loss(leaves, x):
        output = apply(jax.tree.unflatten(treedef, leaves), x)
        return jnp.mean(output**2), output

    return leaves, loss


_LOAD = """
import pickle, sys
sys.modules["torch"] = None
import jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given, expected = pickle.load(open(sys.argv[2], "rb"))
assert not [m for m in sys.modules if m.startswith(("torch", "flax", "equinox")) and sys.modules[m] is not None]
found = jax.tree.leaves(program.call(*given))
for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_values_and_gradients_in_a_process_without_torch(name, tmp_path):
    pytest.importorskip("flatbuffers")
    leaves, loss = _flat(FRAMEWORKS[name])
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    x = from_torch(torch.randn(2, 1, 8, 8))
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 1, 8, 8"), jnp.float32)
    (tmp_path / "program").write_bytes(jax.export.export(step)(leaves, spec).serialize())
    expected = jax.tree.leaves(step(leaves, x))
    given = jax.tree.map(np.asarray, ((leaves, x), expected))
    (tmp_path / "values").write_bytes(pickle.dumps(given))
    subprocess.run([sys.executable, "-c", _LOAD, tmp_path / "program", tmp_path / "values"], check=True)


@pytest.mark.long
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_gradients_that_an_exported_program_brings_with_it(name):
    leaves, loss = _flat(FRAMEWORKS[name])
    value = lambda leaves, x: loss(leaves, x)[0]  # noqa: E731
    x = from_torch(torch.randn(2, 1, 8, 8))
    exported = jax.export.export(jax.jit(value))(leaves, x)
    expected = jax.grad(value)(leaves, x)
    assert_trees_close(jax.grad(exported.call)(leaves, x), expected, rtol=1e-4, atol=1e-5)
    assert any(jnp.abs(g).max() > 0 for g in expected)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_step_of_training_for_platforms_that_are_not_here(name):
    leaves, loss = _flat(FRAMEWORKS[name])
    optimizer = optax.adam(1e-3)

    def step(leaves, state, x):
        grads, _ = jax.grad(loss, has_aux=True)(leaves, x)
        updates, state = optimizer.update(grads, state, leaves)
        return optax.apply_updates(leaves, updates), state

    exported = jax.export.export(jax.jit(step), platforms=("tpu", "cuda"))
    program = exported(leaves, optimizer.init(leaves), jnp.ones((2, 1, 8, 8)))
    assert program.platforms == ("tpu", "cuda")
    text = program.mlir_module()
    assert "stablehlo.convolution" in text
    assert "custom_call" not in text
