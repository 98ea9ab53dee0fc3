"""Linen variables in torch's terms and on disk: state dicts, safetensors, msgpack, Orbax, masks by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.torch
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels, TiedAutoencoder
from flax import serialization
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, path_aware_map
from linen_models import assert_same_tensors, mixed, normal

pytestmark = pytest.mark.both_engines(every=4)
TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


def _moved(variables):
    """Other values in every leaf, integers too."""
    return jax.tree.map(lambda w: w + 1 if w.dtype != bool else w, variables)


@pytest.mark.parametrize("make", [mixed, lambda: TiedAutoencoder(5, 3), lambda: Channels(3)])
def test_state_dict_round_trip(make):
    module = make()
    model = TorchModule(module)
    x = jnp.arange(3) if isinstance(module, TiedAutoencoder) else jnp.ones((5, 3))
    variables = model.init(KEY, x)
    state = torchleaf.state_dict(model, variables)
    assert_same_tensors(state, module.state_dict())
    other = make()
    loaded = torchleaf.load_state_dict(model, other.state_dict(), variables)
    assert_same_tensors(torchleaf.state_dict(model, loaded), other.state_dict())
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert_trees_close(variables, model.init(KEY, x), rtol=0, atol=0)
    plain = torchleaf.to_torch_module(model, _moved(variables))
    assert_same_tensors(plain.state_dict(), torchleaf.state_dict(model, _moved(variables)))
    assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == [
        (n, p.requires_grad) for n, p in module.named_parameters()
    ]


def test_state_dict_is_zero_copy():
    module = mixed()
    model = TorchModule(module)
    for name, tensor in torchleaf.state_dict(model, model.init(KEY, jnp.ones((5, 3)))).items():
        if tensor.dtype != torch.int64:
            assert tensor.data_ptr() == module.state_dict()[name].data_ptr(), name


def test_bound_modules_bring_their_variables(rng):
    module, x = mixed().eval(), normal(rng, 5, 3)

    class Model(nn.Module):
        def setup(self):
            self.encoder, self.head = TorchModule(module), nn.Dense(3)

        def __call__(self, x):
            return self.head(self.encoder(x))

    variables = _moved(Model().init(KEY, x))
    encoder = Model().bind(variables).encoder
    inner = {col: tree["encoder"] for col, tree in variables.items()}
    assert_same_tensors(torchleaf.state_dict(encoder), torchleaf.state_dict(TorchModule(module), inner))
    loaded = torchleaf.load_state_dict(encoder, module.state_dict())
    assert_trees_close(loaded["params"], TorchModule(module).init(KEY, x)["params"], rtol=0, atol=0)
    plain = torchleaf.to_torch_module(encoder)
    assert_trees_close(from_torch(plain(torchleaf.to_torch(x))), encoder(x))


def test_load_state_dict_gives_the_kind_of_dict_it_got():
    module = mixed()
    model = TorchModule(module)
    variables = freeze(model.init(KEY, jnp.ones((5, 3))))
    assert isinstance(torchleaf.load_state_dict(model, module.state_dict(), variables), FrozenDict)


def test_weights_without_variables_are_refused():
    model = TorchModule(mixed())
    variables = model.init(KEY, jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=r"state_dict\(model, variables\).*model\.bind"):
        torchleaf.state_dict(model)
    with pytest.raises(KeyError, match=r"no frozen/0/weight; they have the collections \['params'\]"):
        torchleaf.state_dict(model, {"params": variables["params"]})


def test_safetensors_both_ways(tmp_path):
    module, file = mixed(), tmp_path / "weights.safetensors"
    model = TorchModule(module)
    variables = _moved(model.init(KEY, jnp.ones((5, 3))))
    safetensors.torch.save_file(torchleaf.state_dict(model, variables), file)
    plain = mixed()
    plain.load_state_dict(safetensors.torch.load_file(file))
    assert_same_tensors(plain.state_dict(), torchleaf.state_dict(model, variables))
    again = torchleaf.load_state_dict(model, safetensors.torch.load_file(file), model.init(KEY, jnp.ones((5, 3))))
    assert_trees_close(again, variables, rtol=0, atol=0)
    arrays = {name: leaf for col in variables.values() for name, leaf in flatten_dict(col, sep=".").items()}
    safetensors.flax.save_file(arrays, file)
    assert_trees_close(safetensors.flax.load_file(file), arrays, rtol=0, atol=0)
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in plain.state_dict().items())


def test_msgpack_and_orbax(tmp_path):
    model = TorchModule(mixed())
    template = model.init(KEY, jnp.ones((5, 3)))
    variables = _moved(template)
    restored = serialization.from_bytes(template, serialization.to_bytes(variables))
    assert_trees_close(jax.tree.map(jnp.asarray, restored), variables, rtol=0, atol=0)
    assert_same_tensors(torchleaf.state_dict(model, restored), torchleaf.state_dict(model, variables))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", template)
    assert_trees_close(restored, variables, rtol=0, atol=0)
    x = jnp.ones((5, 3))
    assert_trees_close(model.apply(restored, x, train=False), model.apply(variables, x, train=False), rtol=0, atol=0)


def test_masks_by_path_choose_what_weight_decay_touches():
    model = TorchModule(mixed())
    params = model.init(KEY, jnp.ones((5, 3)))["params"]
    mask = path_aware_map(lambda path, _: path[-1] == "weight" and path[0] != "1", params)
    optimizer = optax.add_decayed_weights(0.1, mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert jax.tree.map(lambda u: bool(jnp.any(u)), updates) == mask
    assert flatten_dict(mask, sep=".")["3.weight"]
