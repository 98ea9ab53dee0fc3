"""`stack` makes one Equinox model of many; `test_every_framework_batches.py` runs such ensembles."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torchleaf
from compare import assert_trees_close
from torch import nn

pytestmark = pytest.mark.both_engines

over_leaves = {"in_axes": (eqx.if_array(0), None)}


def _make(hidden: int = 4, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), activation(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2)).eval()


@pytest.fixture
def modules():
    return [_make() for _ in range(3)]


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def test_leaves_are_stacked(modules):
    models = [torchleaf.TorchModule(m) for m in modules]
    ensemble = torchleaf.stack(models)
    assert isinstance(ensemble, torchleaf.TorchModule)
    for kind in ("params", "frozen", "buffers"):
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(getattr(m, kind) for m in models))
        assert_trees_close(getattr(ensemble, kind), expected, rtol=0, atol=0)
    assert ensemble.inference is True


@pytest.mark.long
def test_models_that_hold_torch_modules(modules, x):
    keys = jax.random.split(jax.random.key(0), 3)
    models = [
        eqx.nn.Sequential([torchleaf.TorchModule(m), eqx.nn.Lambda(jnp.sin), eqx.nn.Linear(2, 1, key=k)])
        for m, k in zip(modules, keys, strict=True)
    ]
    ensemble = torchleaf.stack(models)
    call = eqx.filter_vmap(
        lambda m, x: jax.vmap(lambda row: m.layers[2](m.layers[1](row)))(m.layers[0](x)), **over_leaves
    )
    expected = [jax.vmap(lambda row: m.layers[2](m.layers[1](row)))(m.layers[0](x)) for m in models]
    assert_trees_close(call(ensemble, x), jnp.stack(expected))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: torchleaf.TorchModule(_make(hidden=5)), r"the torch module of models\[1\] differs"),
        (lambda: torchleaf.TorchModule(_make(activation=nn.ReLU)), r"the torch module of models\[1\] differs"),
        (lambda: torchleaf.TorchModule(_make(), vmap_method="loop"), r"the torch module of models\[1\] differs"),
        (lambda: torchleaf.TorchModule(_make().requires_grad_(False)), r"the torch module of models\[1\] differs"),
        (lambda: eqx.nn.inference_mode(torchleaf.TorchModule(_make()), value=False), "static leaves differ"),
        (lambda: {"model": torchleaf.TorchModule(_make())}, r"models\[1\] has structure"),
        (lambda: eqx.nn.Identity(), r"models\[1\] has structure"),
    ],
    ids=["width", "activation", "options", "frozen", "mode", "structure", "type"],
)
def test_models_that_differ_are_refused(other, message):
    with pytest.raises(ValueError, match=rf"stack: .*{message}|stack: {message}"):
        torchleaf.stack([torchleaf.TorchModule(_make()), other()])


def test_leaves_of_other_shapes_are_refused():
    wide, narrow = (eqx.nn.Linear(3, 3, use_bias=False, key=jax.random.key(0)) for _ in range(2))
    narrow = eqx.tree_at(lambda m: m.weight, narrow, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"stack: leaves of different shapes \[\(2, 3\), \(3, 3\)\]"):
        torchleaf.stack([wide, narrow])


def test_an_empty_ensemble_is_refused():
    with pytest.raises(ValueError, match="stack: models is empty; give at least one"):
        torchleaf.stack([])
