"""Weights in torch's terms: `trainable`, `state_dict`, `load_state_dict`, `to_torch_module`."""

import copy
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels, ResNet18, TiedAutoencoder
from layer_catalogue import SPECS
from torch import nn

every_layer = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def _mixed() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module(torch.randn(8, 3))
    module[0].requires_grad_(False)
    return module.eval()


def _assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def _moved(model):
    """Other values in every leaf, integers too."""
    return jax.tree.map(lambda w: w + 1 if eqx.is_array(w) and w.dtype != bool else w, model)


# --- trainable -----------------------------------------------------------------------------------


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


# --- state_dict ----------------------------------------------------------------------------------


@every_layer
def test_state_dict_is_that_of_torch_and_loads_into_it(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        state = torchleaf.state_dict(torchleaf.TorchModule(module))
        _assert_same_tensors(state, module.state_dict())
        spec.make().load_state_dict(state, strict=True)


def test_state_dict_of_updated_weights_gives_torch_the_updated_model():
    model = _moved(torchleaf.TorchModule(_mixed()))
    plain = _mixed()
    plain.load_state_dict(torchleaf.state_dict(model), strict=True)
    x = torch.randn(5, 3)
    assert_trees_close(model(from_torch(x)), from_torch(plain(x)))


def test_state_dict_is_zero_copy():
    module = _mixed()
    model = torchleaf.TorchModule(module)
    for name, tensor in torchleaf.state_dict(model).items():
        if tensor.dtype != torch.int64:
            assert tensor.data_ptr() == module.state_dict()[name].data_ptr(), name
    updated = _moved(model)
    pointer = updated.params["2.weight"].unsafe_buffer_pointer()
    assert torchleaf.state_dict(updated)["2.weight"].data_ptr() == pointer


def test_state_dict_names_tied_weights_twice_and_leaves_out_non_persistent_buffers():
    tied = torchleaf.state_dict(torchleaf.TorchModule(TiedAutoencoder(5, 3)))
    assert list(tied) == ["embed.weight", "project.weight", "project.bias"]
    assert tied["embed.weight"].data_ptr() == tied["project.weight"].data_ptr()
    assert list(torchleaf.state_dict(torchleaf.TorchModule(Channels(4)))) == ["weight", "order", "keep"]


def test_state_dict_goes_through_torch_save():
    model = torchleaf.TorchModule(_mixed())
    file = io.BytesIO()
    torch.save(torchleaf.state_dict(model), file)
    file.seek(0)
    loaded = torchleaf.load_state_dict(torchleaf.TorchModule(_mixed()), torch.load(file, weights_only=True))
    assert_trees_close(jax.tree.leaves(loaded), jax.tree.leaves(model), rtol=0, atol=0)


# --- load_state_dict -----------------------------------------------------------------------------


@every_layer
def test_load_state_dict_gives_the_weights_of_another_module(spec):
    with jax.enable_x64(spec.x64):
        model, other = torchleaf.TorchModule(spec.make()), spec.make()
        kept = jax.tree.map(lambda w: w.copy() if eqx.is_array(w) else w, model)
        loaded = torchleaf.load_state_dict(model, other.state_dict())
        _assert_same_tensors(torchleaf.state_dict(loaded), other.state_dict())
        assert jax.tree.structure(loaded) == jax.tree.structure(model)
        assert_trees_close(jax.tree.leaves(model), jax.tree.leaves(kept), rtol=0, atol=0)


def test_load_state_dict_computes_as_the_other_module():
    model, other = torchleaf.TorchModule(ResNet18(4).eval()), ResNet18(4).eval()
    x = torch.randn(2, 3, 32, 32)
    loaded = torchleaf.load_state_dict(model, other.state_dict())
    assert_trees_close(eqx.filter_jit(loaded)(from_torch(x)), from_torch(other(x)), rtol=1e-4, atol=1e-5)


def test_load_state_dict_shares_memory_unless_copied():
    model, other = torchleaf.TorchModule(nn.Linear(3, 4)), nn.Linear(3, 4)
    shared = torchleaf.load_state_dict(model, other.state_dict())
    copied = torchleaf.load_state_dict(model, other.state_dict(), copy=True)
    assert shared.params["weight"].unsafe_buffer_pointer() == other.weight.data_ptr()
    assert copied.params["weight"].unsafe_buffer_pointer() != other.weight.data_ptr()
    assert_trees_close(copied.params, shared.params, rtol=0, atol=0)


def test_load_state_dict_casts_to_the_dtype_of_each_weight():
    model = torchleaf.TorchModule(nn.Linear(3, 4))
    half = {name: tensor.half() for name, tensor in nn.Linear(3, 4).state_dict().items()}
    loaded = torchleaf.load_state_dict(model, half)
    assert_trees_close(loaded.params, {n: from_torch(t).astype(jnp.float32) for n, t in half.items()})


def test_load_state_dict_keeps_compiled_code():
    model, traces = torchleaf.TorchModule(nn.Linear(3, 4)), []

    @eqx.filter_jit
    def call(model, x):
        traces.append(1)
        return model(x)

    call(model, jnp.ones(3))
    call(torchleaf.load_state_dict(model, nn.Linear(3, 4).state_dict()), jnp.ones(3))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"weight": torch.ones(4, 3)}, KeyError, r"does not fit Linear: missing \['bias'\], unexpected \[\]"),
        (
            {"weight": torch.ones(4, 3), "bias": torch.ones(4), "scale": torch.ones(1)},
            KeyError,
            r"missing \[\], unexpected \['scale'\].*torchleaf\.state_dict",
        ),
        (
            {"weight": torch.ones(3, 4), "bias": torch.ones(4)},
            ValueError,
            r"'weight' has shape \(3, 4\), but Linear has \(4, 3\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_load_state_dict_refuses_what_does_not_fit(state, error, message):
    with pytest.raises(error, match=message):
        torchleaf.load_state_dict(torchleaf.TorchModule(nn.Linear(3, 4)), state)


# --- to_torch_module -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_layer
def test_to_torch_module_computes_the_same(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        args, kwargs = spec.draw()
        plain = torchleaf.to_torch_module(torchleaf.TorchModule(module))
        assert type(plain) is type(module)
        assert [(n, m.training) for n, m in plain.named_modules()] == [
            (n, m.training) for n, m in module.named_modules()
        ]
        tolerance = spec.tolerance
        assert_trees_close(
            from_torch(plain(*args, **kwargs)), from_torch(module(*args, **kwargs)), tolerance, tolerance
        )
        _assert_same_tensors(plain.state_dict(), module.state_dict())


@every_layer
def test_to_torch_module_keeps_names_requires_grad_and_ties(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        plain = torchleaf.to_torch_module(torchleaf.TorchModule(module))
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = list(getattr(plain, kind)()), list(getattr(module, kind)())
            assert [(n, t.requires_grad, type(t)) for n, t in ours] == [
                (n, t.requires_grad, type(t)) for n, t in theirs
            ]


def test_to_torch_module_carries_updates_and_trains_in_torch():
    model = torchleaf.TorchModule(_mixed())
    plain = torchleaf.to_torch_module(_moved(model))
    x = torch.randn(5, 3)
    assert_trees_close(from_torch(plain(x)), _moved(model)(from_torch(x)))
    before = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    plain(x).sum().backward()
    optimizer.step()
    assert not torch.equal(plain[2].bias, before["2.bias"])
    assert torch.equal(plain[0].weight, before["0.weight"])


def test_to_torch_module_is_independent_unless_asked():
    module = nn.Linear(3, 4)
    model = torchleaf.TorchModule(module)
    independent, sharing = torchleaf.to_torch_module(model), torchleaf.to_torch_module(model, copy=False)
    assert independent.weight.data_ptr() != module.weight.data_ptr()
    assert sharing.weight.data_ptr() == model.params["weight"].unsafe_buffer_pointer() == module.weight.data_ptr()
    assert sharing.weight is not module.weight
    with torch.no_grad():
        independent.weight.zero_()
    assert torch.any(module.weight)


def test_to_torch_module_keeps_ties():
    plain = torchleaf.to_torch_module(torchleaf.TorchModule(TiedAutoencoder(5, 3)))
    assert plain.embed.weight is plain.project.weight


def test_to_torch_module_follows_the_inference_flag():
    model = torchleaf.TorchModule(nn.Dropout(0.5))
    assert torchleaf.to_torch_module(model).training
    assert not torchleaf.to_torch_module(eqx.nn.inference_mode(model)).training


def test_round_trip_through_both_frameworks():
    model = _moved(torchleaf.TorchModule(_mixed()))
    again = torchleaf.TorchModule(torchleaf.to_torch_module(model))
    assert_trees_close(
        (again.params, again.frozen, again.buffers, again.inference),
        (model.params, model.frozen, model.buffers, model.inference),
        rtol=0,
        atol=0,
    )


# --- refusals ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("function", [torchleaf.state_dict, torchleaf.to_torch_module])
def test_traced_weights_have_no_tensors(function):
    with pytest.raises(TypeError, match="bias is a traced array"):
        eqx.filter_jit(function)(torchleaf.TorchModule(nn.Linear(3, 4)))
