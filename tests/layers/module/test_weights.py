"""Which leaves of Equinox models to train, and what has no torch weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torchleaf
from compare import assert_trees_close
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


def _mixed() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    module[0].requires_grad_(False)
    return module


def test_trainable_marks_params_of_torch_and_arrays_of_jax():
    model = {
        "torch": torchleaf.TorchModule(_mixed()),
        "jax": eqx.nn.Linear(2, 3, key=jax.random.key(0)),
        "step": jnp.zeros((), jnp.int32),
        "phase": jnp.zeros((), jnp.complex64),
        "rate": 0.1,
        "activation": jax.nn.relu,
    }
    spec = torchleaf.trainable(model)
    assert jax.tree.structure(spec) == jax.tree.structure(model)
    assert set(spec["torch"].params.values()) == {True}
    assert set(spec["torch"].frozen.values()) | set(spec["torch"].buffers.values()) == {False}
    assert spec["torch"].inference is False
    assert (spec["jax"].weight, spec["jax"].bias) == (True, True)
    assert [spec[k] for k in ("step", "phase", "rate", "activation")] == [False, True, False, False]


def test_trainable_under_jit():
    model = torchleaf.TorchModule(_mixed())
    params = eqx.filter_jit(lambda m: eqx.filter(m, torchleaf.trainable(m)))(model)
    assert_trees_close(jax.tree.leaves(params), jax.tree.leaves(model.params))


def test_loaded_models_have_the_structure_of_the_first():
    model = torchleaf.TorchModule(_mixed())
    loaded = torchleaf.load_state_dict(model, _mixed().state_dict())
    assert jax.tree.structure(loaded) == jax.tree.structure(model)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    "function",
    [torchleaf.state_dict, lambda m: torchleaf.load_state_dict(m, {}), torchleaf.to_torch_module],
    ids=["state_dict", "load_state_dict", "to_torch_module"],
)
@pytest.mark.parametrize("model", [eqx.nn.Identity(), nn.Linear(3, 4)], ids=["equinox", "torch"])
def test_only_torch_modules_have_torch_weights(function, model):
    with pytest.raises(
        TypeError, match=rf"must be a torchleaf TorchModule, got {type(model).__name__}.*model\.encoder"
    ):
        function(model)
