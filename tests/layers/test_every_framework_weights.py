"""Weights in torch's terms, in every framework: `state_dict`, `load_state_dict`, `to_torch_module`, files."""

import copy

import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels, ResNet18, TiedAutoencoder
from frameworks import every_framework
from layer_catalogue import SPECS
from module_reference import snapshot
from stateful_layers import assert_equal
from stateful_layers import each as each_stateful
from torch import nn

pytestmark = [every_framework, pytest.mark.both_engines]

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
    return model.replaced({name: w + 1 for name, w in model.weights.all.items() if w.dtype != bool})


# --- state_dict ----------------------------------------------------------------------------------


@every_layer
def test_state_dict_is_that_of_torch_and_loads_into_it(framework, spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        state = framework(module, **spec.options).state_dict()
        _assert_same_tensors(state, module.state_dict())
        spec.make().load_state_dict(state, strict=True)


def _assert_close_tensors(actual, expected):
    assert_trees_close(from_torch(dict(actual)), from_torch(dict(expected)), rtol=1e-4, atol=1e-5)


@each_stateful
def test_state_dict_has_the_state(framework, spec, engine):
    """After a step, bit for bit torch's (by its own engine), and loaded into another model it goes on from there."""
    assert_same = _assert_same_tensors if engine == "torch" else _assert_close_tensors
    close = {} if engine == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    module, (x, again) = spec.make(), spec.inputs(2)
    twin = copy.deepcopy(module)
    model = framework(module, with_state=True)
    if engine == "xla" and spec.reads_values:
        with pytest.raises(torchleaf.TorchCallError, match=r"reads values"):
            model(from_torch(x))
        return
    model(from_torch(x))
    with torch.no_grad():
        twin(x.clone())
        assert_same(model.state_dict(), twin.state_dict())
        assert_same(model.to_torch().state_dict(), twin.state_dict())
        fresh = spec.make()
        fresh.load_state_dict(twin.state_dict())
        loaded = framework(spec.make(), with_state=True).load_state_dict(model.state_dict())
        assert_trees_close(loaded(from_torch(again)), from_torch(fresh(again.clone())), **close)
        assert_same(loaded.state_dict(), fresh.state_dict())


def test_state_dict_of_updated_weights_gives_torch_the_updated_model(framework):
    model, plain = _moved(framework(_mixed())), _mixed()
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(5, 3)
    assert_trees_close(model(from_torch(x)), from_torch(plain(x)))


def test_state_dict_is_zero_copy(framework):
    module = _mixed()
    model = framework(module)
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.int64:
            assert tensor.data_ptr() == module.state_dict()[name].data_ptr(), name
    updated = _moved(model)
    pointer = updated.weights.params["2.weight"].unsafe_buffer_pointer()
    assert updated.state_dict()["2.weight"].data_ptr() == pointer


def test_state_dict_names_tied_weights_twice_and_leaves_out_non_persistent_buffers(framework):
    tied = framework(TiedAutoencoder(5, 3)).state_dict()
    assert list(tied) == ["embed.weight", "project.weight", "project.bias"]
    assert tied["embed.weight"].data_ptr() == tied["project.weight"].data_ptr()
    assert list(framework(Channels(4)).state_dict()) == ["weight", "order", "keep"]


# --- files ---------------------------------------------------------------------------------------


def _through_torch_save(tensors, file):
    torch.save(tensors, file)
    return torch.load(file, weights_only=True)


def _through_safetensors(tensors, file):
    safetensors.torch.save_file({name: t.clone() for name, t in tensors.items()}, file)  # which wants memory untied
    return safetensors.torch.load_file(file)


@pytest.mark.parametrize("through", [_through_torch_save, _through_safetensors])
@pytest.mark.parametrize(
    "make",
    [_mixed, lambda: TiedAutoencoder(5, 3), lambda: Channels(4), lambda: nn.Linear(3, 4).bfloat16()],
    ids=["mixed", "tied", "buffers", "bfloat16"],
)
def test_files_give_every_bit_back_to_either_side(framework, make, through, tmp_path):
    """What a model saves, torch and another model load; what torch saves, a model loads."""
    model = _moved(framework(make()))
    from_jax = through(model.state_dict(), tmp_path / "jax")
    loaded, plain = framework(make()).load_state_dict(from_jax), make()
    plain.load_state_dict(from_jax, strict=True)
    _assert_same_tensors(loaded.state_dict(), model.state_dict())
    _assert_same_tensors(plain.state_dict(), model.state_dict())
    from_torch_side = through(plain.state_dict(), tmp_path / "torch")
    _assert_same_tensors(framework(make()).load_state_dict(from_torch_side).state_dict(), plain.state_dict())


def test_safetensors_of_whole_modules(framework, tmp_path):
    """`save_model` and `load_model`, which know of tied weights."""
    model, fresh = _moved(framework(TiedAutoencoder(5, 3))), TiedAutoencoder(5, 3)
    safetensors.torch.save_model(model.to_torch(), tmp_path / "model.safetensors")
    safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    _assert_same_tensors(fresh.state_dict(), model.state_dict())
    assert_equal(framework(fresh).weights, model.weights)


# --- load_state_dict -----------------------------------------------------------------------------


@every_layer
def test_load_state_dict_gives_the_weights_of_another_module(framework, spec):
    with jax.enable_x64(spec.x64):
        model, other = framework(spec.make(), **spec.options), spec.make()
        kept = {name: leaf.copy() for name, leaf in model.weights.all.items()}
        loaded = model.load_state_dict(other.state_dict())
        _assert_same_tensors(loaded.state_dict(), other.state_dict())
        assert jax.tree.structure(loaded.weights) == jax.tree.structure(model.weights)
        assert_equal(model.weights.all, kept)


def test_load_state_dict_computes_as_the_other_module(framework):
    model, other = framework(ResNet18(4).eval()), ResNet18(4).eval()
    x = torch.randn(2, 3, 32, 32)
    loaded = model.load_state_dict(other.state_dict())
    y = loaded.jit(lambda m, x: m(x))(from_torch(x))
    assert_trees_close(y, from_torch(other(x)), rtol=1e-4, atol=1e-5)


def test_load_state_dict_shares_memory_unless_copied(framework):
    model, other = framework(nn.Linear(3, 4)), nn.Linear(3, 4)
    shared = model.load_state_dict(other.state_dict()).weights.params
    copied = model.load_state_dict(other.state_dict(), copy=True).weights.params
    assert shared["weight"].unsafe_buffer_pointer() == other.weight.data_ptr()
    assert copied["weight"].unsafe_buffer_pointer() != other.weight.data_ptr()
    assert_equal(copied, shared)


def test_load_state_dict_casts_to_the_dtype_of_each_weight(framework):
    half = {name: tensor.half() for name, tensor in nn.Linear(3, 4).state_dict().items()}
    loaded = framework(nn.Linear(3, 4)).load_state_dict(half).weights.params
    assert_trees_close(loaded, {n: from_torch(t).astype(jnp.float32) for n, t in half.items()})


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
def test_load_state_dict_refuses_what_does_not_fit(framework, state, error, message):
    with pytest.raises(error, match=message):
        framework(nn.Linear(3, 4)).load_state_dict(state)


# --- to_torch_module -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_layer
def test_to_torch_module_is_the_module_again(framework, spec):
    """It computes the same, and has names, modes, `requires_grad` and ties of the original, which stays as it was."""
    with jax.enable_x64(spec.x64):
        module = spec.make()
        before = snapshot(module)
        plain = framework(module, **spec.options).to_torch()
        assert type(plain).__name__ == type(module).__name__  # a parametrised module has a class of its own
        assert isinstance(plain, type(module).__bases__)
        assert [(n, m.training) for n, m in plain.named_modules()] == [
            (n, m.training) for n, m in module.named_modules()
        ]
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = list(getattr(plain, kind)()), list(getattr(module, kind)())
            assert [(n, t.requires_grad, type(t)) for n, t in ours] == [
                (n, t.requires_grad, type(t)) for n, t in theirs
            ]
        _assert_same_tensors(plain.state_dict(), module.state_dict())
        assert snapshot(module) == before
        args, kwargs = spec.draw()
        expected = from_torch(module(*args, **kwargs))
        assert_trees_close(from_torch(plain(*args, **kwargs)), expected, spec.tolerance, spec.tolerance)


def test_to_torch_module_carries_updates_and_trains_in_torch(framework):
    moved = _moved(framework(_mixed()))
    plain, x = moved.to_torch(), torch.randn(5, 3)
    assert_trees_close(from_torch(plain(x)), moved(from_torch(x)))
    before = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    plain(x).sum().backward()
    optimizer.step()
    assert not torch.equal(plain[2].bias, before["2.bias"])
    assert torch.equal(plain[0].weight, before["0.weight"])


def test_to_torch_module_is_independent_unless_asked(framework):
    module = nn.Linear(3, 4)
    model = framework(module)
    independent, sharing = model.to_torch(), model.to_torch(copy=False)
    pointer = model.weights.params["weight"].unsafe_buffer_pointer()
    assert independent.weight.data_ptr() != module.weight.data_ptr()
    assert sharing.weight.data_ptr() == pointer == module.weight.data_ptr()
    assert sharing.weight is not module.weight
    with torch.no_grad():
        independent.weight.zero_()
    assert torch.any(module.weight)


def test_to_torch_module_keeps_ties(framework):
    plain = framework(TiedAutoencoder(5, 3)).to_torch()
    assert plain.embed.weight is plain.project.weight


def test_to_torch_module_follows_the_mode(framework):
    model = framework(nn.Dropout(0.5))
    assert model.to_torch().training
    assert not model.in_mode(training=False).to_torch().training


def test_round_trip_through_torch(framework):
    model = _moved(framework(_mixed()))
    again = framework(model.to_torch())
    assert_equal(again.weights, model.weights)
    assert not again.to_torch().training


def test_traced_weights_have_no_tensors(framework):
    for function in (lambda m: m.state_dict(), lambda m: m.to_torch()):
        with pytest.raises(TypeError, match=r"(weight|bias) is a traced array"):
            framework(nn.Linear(3, 4)).jit(function)()
