"""The NNX `TorchModule` itself: which Variable is where, whose memory it holds, what a call does to it, weights in and
out."""

import copy
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.torch
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels, Gated, ParameterContainers, ResNet18, TiedAutoencoder
from flax import nnx
from fresh_process import run_python
from layer_catalogue import SPECS
from module_reference import snapshot
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
Buffer, Frozen, TorchModule = torchleaf.nnx.Buffer, torchleaf.nnx.Frozen, torchleaf.nnx.TorchModule

every_layer = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
X = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)


def _network() -> nn.Module:
    """A frozen layer, running statistics, dropout, and a layer to train."""
    module = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    )
    module[0].requires_grad_(False)
    return module


def _types(model: nnx.Module) -> dict[str, type]:
    return {".".join(path): type(v) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))}


def _values(model: nnx.Module) -> dict[str, jax.Array]:
    return {".".join(path): v[...] for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))}


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# --- Variables -----------------------------------------------------------------------------------


def test_variables_by_type():
    assert _types(TorchModule(_network())) == {
        "0.weight": Frozen,
        "0.bias": Frozen,
        "1.weight": nnx.Param,
        "1.bias": nnx.Param,
        "1.running_mean": nnx.BatchStat,
        "1.running_var": nnx.BatchStat,
        "1.num_batches_tracked": nnx.BatchStat,
        "3.1.weight": nnx.Param,
        "3.1.bias": nnx.Param,
    }
    assert _types(TorchModule(Channels(4))) == {"weight": nnx.Param, "order": Buffer, "keep": Buffer, "scale": Buffer}


@every_layer
def test_paths_are_torch_names_and_values_torch_tensors(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        assert_trees_close(_values(TorchModule(module, **spec.options)), from_torch(_tensors(module)), rtol=0, atol=0)


def test_attributes_mirror_the_module():
    module = Gated(3, 4, 2)
    model = TorchModule(module)
    assert_trees_close(model.layers[1].value.weight[...], from_torch(module.layers[1]["value"].weight))
    assert model.layers[1] is model.layers["1"] is getattr(model.layers, "1")
    assert model.encode[1][1].bias is model["encode"]["1"]["1"].bias
    containers = TorchModule(ParameterContainers(3))
    assert containers.scales[2] is containers["scales"]["2"]
    assert containers.shifts["in"].shape == (3,)
    with pytest.raises(KeyError, match=r"2; there are \['0', '1'\]"):
        model.layers[2]
    with pytest.raises(KeyError, match=r"'deterministic'; there are \['encode', 'layers'\]"):
        model["deterministic"]
    with pytest.raises(TypeError, match="not iterable"):
        iter(model.layers)


def test_submodules_without_weights_are_left_out():
    model = TorchModule(nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Sequential(nn.Dropout())))
    assert [path for path, _ in nnx.iter_modules(model)] == [("1",), ()]


class _Names(nn.Module):
    """Names that mean something to NNX; `rngs_` makes sure that two never meet."""

    def __init__(self):
        super().__init__()
        self.rngs, self.rngs_, self.sow = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.deterministic = nn.Parameter(torch.ones(2))
        self.nested = nn.ParameterDict({"set_attributes": torch.ones(2), "use_running_average": torch.ones(2)})

    def forward(self, x):
        y = self.sow(self.rngs(self.rngs_(x))) * self.deterministic
        return y + self.nested["set_attributes"] * self.nested["use_running_average"]


def test_names_that_mean_something_to_nnx_get_an_underscore():
    module = _Names()
    model = TorchModule(module, rngs=nnx.Rngs(0))
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {
        *("rngs_", "rngs__", "sow_", "deterministic_", "nested")
    }
    assert model.nested["use_running_average"] is model.nested.use_running_average_
    model.eval()
    assert model.deterministic is True
    assert isinstance(model.nested.set_attributes_, nnx.Param)
    assert_trees_close(model(X[:, :2]), from_torch(module(torch.tensor(X[:, :2]))))
    assert list(torchleaf.state_dict(model)) == list(module.state_dict())


@pytest.mark.parametrize("module", [nn.Linear(3, 4), _network(), nn.LSTM(3, 4), Channels(4), nn.Conv2d(3, 4, 3)])
def test_values_share_memory_with_torch_until_an_update(module):
    tensors = {name: t for name, t in _tensors(module).items() if t.dtype != torch.int64}  # int32 in JAX
    model = TorchModule(module)
    for name, value in _values(nnx.merge(*nnx.split(model))).items():
        if name in tensors:
            assert value.unsafe_buffer_pointer() == tensors[name].data_ptr(), name
    for name, value in _values(TorchModule(module, copy=True)).items():
        assert value.unsafe_buffer_pointer() != _tensors(module)[name].data_ptr(), name
    before = copy.deepcopy(module.state_dict())
    nnx.update(model, jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, nnx.state(model)))
    assert_trees_close(from_torch(dict(module.state_dict())), from_torch(dict(before)), rtol=0, atol=0)


def test_tied_weights_are_one_variable():
    module = TiedAutoencoder(5, 3)
    model = TorchModule(module)
    assert model.embed.weight is model.project.weight
    assert list(_types(model)) == ["embed.weight", "project.bias"]
    ids = jnp.arange(5)
    grads = nnx.grad(lambda m: jnp.sum(m(ids) ** 2))(model)
    module(torch.arange(5)).square().sum().backward()
    expected = {"embed": {"weight": module.embed.weight.grad}, "project": {"bias": module.project.bias.grad}}
    assert_trees_close(nnx.to_pure_dict(grads), from_torch(expected), rtol=1e-4)
    model.embed.weight[...] += 1
    clone = nnx.clone(model)
    assert clone.embed.weight is clone.project.weight
    with torch.no_grad():
        module.embed.weight += 1
    assert_trees_close(clone(ids), from_torch(module(torch.arange(5))))


def test_a_submodule_in_two_places_is_one_node():
    layer = nn.Linear(3, 3)
    model = TorchModule(nn.Sequential(layer, nn.Tanh(), layer))
    assert model[0] is model[2]
    assert_trees_close(model(X), from_torch(layer(layer(torch.tensor(X)).tanh())))


def test_wrapping_and_calling_leave_the_torch_module_as_it_was():
    module = _network()
    before = snapshot(module)
    model = TorchModule(module, rngs=nnx.Rngs(0))
    nnx.grad(lambda m: m(X).sum())(model)
    model.eval()
    model(X)
    assert snapshot(module) == before


@pytest.mark.parametrize("copied", [nnx.clone, copy.deepcopy, lambda m: jax.tree.map(lambda x: x, m)])
def test_copies_share_the_code_and_not_the_variables(copied):
    model = TorchModule(_network(), rngs=nnx.Rngs(0))
    other = copied(model)
    assert nnx.graphdef(other) == nnx.graphdef(model)
    assert jax.tree.structure(other) == jax.tree.structure(model)
    other[1].weight[...] *= 2
    assert_trees_close(model[1].weight[...], jnp.ones(4), rtol=0)
    assert_trees_close(other[1].weight[...], 2 * jnp.ones(4), rtol=0)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear, r"got type \(a class: pass an instance\)"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "must be a torch.nn.Module, got Linear"),
        (nn.LazyLinear(3), "LazyLinear.weight is uninitialised"),
    ],
    ids=["class", "flax", "lazy"],
)
def test_modules_that_cannot_be_wrapped(module, message):
    with pytest.raises(TypeError, match=message):
        TorchModule(module)


# --- calls ---------------------------------------------------------------------------------------


def test_calls_agree_with_torch_and_update_buffers_in_place():
    module = _network()
    module[2].p = 0.0
    model = TorchModule(module, copy=True)
    statistics = model[1].running_mean
    for _ in range(3):
        assert_trees_close(model(X), from_torch(module(torch.tensor(X))), rtol=1e-4)
    assert model[1].running_mean is statistics
    assert model[1].num_batches_tracked[...] == 3
    assert_trees_close(_values(model), from_torch(_tensors(module)))
    model.eval()
    module.eval()
    assert_trees_close(model(X), from_torch(module(torch.tensor(X))), rtol=1e-4)
    assert_trees_close(_values(model), from_torch(_tensors(module)))


def test_agrees_with_the_layers_of_nnx():
    linear, norm = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    torch_linear, torch_norm = TorchModule(nn.Linear(3, 4)), TorchModule(nn.BatchNorm1d(4))
    torch_linear.weight[...], torch_linear.bias[...] = linear.kernel[...].T, linear.bias[...]
    assert_trees_close(torch_linear(X), linear(X))
    assert_trees_close(torch_norm(torch_linear(X)), norm(linear(X)), rtol=1e-4, atol=1e-5)
    assert_trees_close(torch_norm.running_mean[...], norm.mean[...])
    # torch keeps the unbiased variance
    assert_trees_close(torch_norm.running_var[...] - 0.9, (norm.var[...] - 0.9) * len(X) / (len(X) - 1), rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_torchs_at_first(training):
    model = TorchModule(nn.Dropout().train(training))
    assert model.deterministic is not training


class _Holder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.torch = TorchModule(nn.Dropout(0.5), rngs=rngs)
        self.flax = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    "switched",
    [
        lambda m: m.eval() or m,
        lambda m: m.set_attributes(deterministic=True) or m,
        lambda m: m.set_attributes(TorchModule, deterministic=True) or m,
        lambda m: nnx.view(m, deterministic=True),
        lambda m: nnx.with_attributes(m, deterministic=True),
    ],
    ids=["eval", "set_attributes", "by-type", "view", "with_attributes"],
)
def test_the_mode_is_switched_as_in_nnx(switched):
    model = _Holder(nnx.Rngs(0))
    other = switched(model)
    assert other.torch.deterministic is True
    assert_trees_close(other.torch(X), jnp.asarray(X))
    other.train()
    assert other.torch.deterministic is False
    assert not jnp.array_equal(other.torch(X), X)
    assert_trees_close(other.torch(X, deterministic=True), jnp.asarray(X))


def test_submodules_in_another_mode_stay_in_it():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    module[1].eval()
    model = TorchModule(module, rngs=nnx.Rngs(0))
    model(X)
    assert model[1].num_batches_tracked[...] == 0
    assert "num_batches_tracked: bool" not in nnx.view_info(model)
    assert "deterministic: bool | None = None\n    if True, torch's evaluation mode." in nnx.view_info(model)


class _Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, x, *, scale=1.0):
        self.calls += 1
        return {"code": scale * self.encoder(x)}

    def forward(self, x):
        return self.decoder(self.encode(x)["code"])


def test_methods_by_name():
    module = _Methods()
    model = TorchModule(module, copy=True)
    assert_trees_close(model.call("encode", X, scale=2.0), from_torch(module.encode(torch.tensor(X), scale=2.0)))
    assert_trees_close(model(X), from_torch(module(torch.tensor(X))))
    assert model.calls[...] == 2
    with pytest.raises(AttributeError, match="_Methods has no method 'decode'"):
        model.call("decode", X)


class _OwnArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, deterministic=False, rngs=3):
        return self.weight * x * (2 if deterministic else 1) * rngs * (5 if self.training else 1)

    def other(self, x):
        return x * (5 if self.training else 1)


def test_torch_arguments_named_as_ours():
    model = TorchModule(_OwnArguments())
    assert model(jnp.ones(())) == 15
    assert model(jnp.ones(()), deterministic=True) == 30
    assert model(jnp.ones(()), rngs=1) == 5
    assert model.call("other", jnp.ones(()), deterministic=True) == 1
    model.eval()
    assert model(jnp.ones(()), deterministic=False) == 3


def test_channels_last():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    expected = module(torch.tensor(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_trees_close(TorchModule(module, channels_last=True)(images), from_torch(expected), rtol=1e-4)


@pytest.mark.torch_engine
def test_forward_mode_option_reaches_the_call():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(TorchModule(nn.Linear(3, 4), forward_mode=False), (X,), (X,))


def test_out_shape_option_reaches_the_call():
    with pytest.raises(torchleaf.TorchCallError, match="out_shape"):
        TorchModule(nn.Linear(3, 4), out_shape=jax.ShapeDtypeStruct((16, 5), jnp.float32))(X)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("option", ["vmap_method", "residuals"])
def test_options_that_are_none(option):
    with pytest.raises(ValueError, match=f"{option} must be"):
        TorchModule(nn.Linear(3, 4), **{option: "none"})


# --- randomness ----------------------------------------------------------------------------------


def test_draws_as_nnx_dropout_does():
    """The same keys from the same streams, at the same times."""
    model = _Holder(nnx.Rngs(params=0, dropout=1))
    plain = nnx.Dropout(0.5, rngs=nnx.Rngs(params=0, dropout=1))
    assert model.torch.rngs.key[...] == plain.rngs.key[...]
    for deterministic in (False, True, False):
        model.torch(X, deterministic=deterministic)
        plain(X, deterministic=deterministic)
        assert model.torch.rngs.count[...] == plain.rngs.count[...]
    first, second = model.torch(X), model.torch(X)
    assert not jnp.array_equal(first, second)
    kept = np.asarray(first) != 0
    assert_trees_close(first[kept], 2 * jnp.asarray(X)[kept])


def test_the_same_rngs_draw_the_same_numbers():
    model, seeded = TorchModule(nn.Dropout()), [TorchModule(nn.Dropout(), rngs=nnx.Rngs(dropout=7)) for _ in range(2)]
    assert_trees_close(seeded[0](X), seeded[1](X), rtol=0)
    key = nnx.Rngs(dropout=7).dropout()
    by_key = model(X, rngs=key)
    for rngs in (nnx.Rngs(dropout=7), nnx.Rngs(7), nnx.Rngs(dropout=7).dropout, jax.random.key_data(key)):
        assert_trees_close(model(X, rngs=rngs), by_key, rtol=0)
    assert not jnp.array_equal(seeded[0](X, rngs=key), seeded[0](X))


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Sequential(nn.Dropout()).eval(), nn.Dropout(0.0)])
def test_keys_are_drawn_only_where_they_are_used(module):
    model = TorchModule(module, rngs=nnx.Rngs(0))
    model(X)
    jax.jit(lambda x: model(x))(X)  # would be a TraceContextError
    assert model.rngs.count[...] == 0


@pytest.mark.parametrize("rngs", [None, nnx.Rngs(params=0)], ids=["none", "no stream"])
def test_random_ops_without_rngs(rngs):
    with pytest.raises(torchleaf.RandomnessError, match=r"`rngs=nnx.Rngs.*`dropout`.*submodule `2`") as error:
        TorchModule(_network(), rngs=rngs)(X)
    assert "key=" not in str(error.value)
    TorchModule(_network(), rngs=rngs)(X, deterministic=True)


@pytest.mark.usefixtures("no_type_checks")
def test_rngs_of_another_type():
    with pytest.raises(TypeError, match=r"rngs must be an nnx.Rngs.*got int"):
        TorchModule(nn.Dropout(), rngs=0)
    with pytest.raises(TypeError, match=r"rngs must be an nnx.Rngs.*got int"):
        TorchModule(nn.Dropout())(X, rngs=0)


# --- display -------------------------------------------------------------------------------------


def test_display_and_tabulate(capsys):
    model = TorchModule(_network(), rngs=nnx.Rngs(0))
    nnx.display(model)
    shown = capsys.readouterr().out
    assert "TorchModule( # Frozen: 16 (64 B), Param: 18 (72 B), BatchStat: 9 (36 B)" in shown
    assert "running_mean=BatchStat(" in shown
    assert "_torch" not in shown
    assert "running_mean=BatchStat(" in repr(model)
    table = nnx.tabulate(model, X, console_kwargs={"width": 200, "force_terminal": False})
    for column in ("BatchStat", "Frozen", "Param", "RngState"):
        assert column in table
    assert table.count("TorchModule") == 2  # the title and one row


# --- weights in torch's terms, and checkpoints ---------------------------------------------------


def _assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def _moved(model: TorchModule) -> TorchModule:
    """Other values in every Variable, integers too."""
    nnx.update(model, jax.tree.map(lambda x: x if x.dtype == bool else x + 1, nnx.state(model, nnx.Not(nnx.RngState))))
    return model


@every_layer
def test_state_dict_round_trip(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        model = TorchModule(module, **spec.options)
        _assert_same_tensors(torchleaf.state_dict(model), module.state_dict())
        types = _types(model)
        other = {name: t.clone() if t.dtype == torch.bool else t + 1 for name, t in module.state_dict().items()}
        assert torchleaf.load_state_dict(model, other) is model
        _assert_same_tensors(torchleaf.state_dict(model), other)
        assert _types(model) == types


def test_loading_changes_the_variables_and_copies_keep_theirs():
    model = TorchModule(_network())
    kept, weight = nnx.clone(model), model[0].weight
    other = _network().state_dict()
    torchleaf.load_state_dict(model, other)
    assert model[0].weight is weight
    assert_trees_close(weight[...], from_torch(other["0.weight"]), rtol=0)
    assert weight[...].unsafe_buffer_pointer() == other["0.weight"].data_ptr()
    assert not jnp.array_equal(kept[0].weight[...], weight[...])
    with pytest.raises(KeyError, match=r"missing \['0.bias'\], unexpected \['bias'\]"):
        torchleaf.load_state_dict(model, {("bias" if k == "0.bias" else k): v for k, v in other.items()})
    with pytest.raises(TypeError, match="holds its state itself"):
        torchleaf.state_dict(model, nnx.state(model))


@pytest.mark.parametrize("training", [True, False])
def test_to_torch_module(training):
    module = _network()
    model = _moved(TorchModule(module, copy=True))
    model.train() if training else model.eval()
    back = torchleaf.to_torch_module(model)
    assert type(back) is type(module)
    assert back.training is training
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in module.parameters()]
    _assert_same_tensors(back.state_dict(), torchleaf.state_dict(model))
    assert_trees_close(from_torch(back.eval()(torch.tensor(X))), model(X, deterministic=True), rtol=1e-4)


@pytest.mark.parametrize("make", [_network, lambda: Channels(4), lambda: TiedAutoencoder(5, 3), lambda: ResNet18(4)])
@pytest.mark.parametrize("store", ["safetensors", "torch", "orbax", "msgpack"])
def test_checkpoints_are_exact(make, store, tmp_path):
    model, fresh = _moved(TorchModule(make())), TorchModule(make())
    path = tmp_path / "weights"
    state = nnx.to_pure_dict(nnx.state(model))
    if store == "safetensors":
        safetensors.torch.save_model(torchleaf.to_torch_module(model), path)
        loaded = torchleaf.to_torch_module(fresh)
        safetensors.torch.load_model(loaded, path)
        torchleaf.load_state_dict(fresh, loaded.state_dict())
    elif store == "torch":
        torch.save(torchleaf.state_dict(model), path)
        torchleaf.load_state_dict(fresh, torch.load(path))
    elif store == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state(model))
            checkpointer.wait_until_finished()
            nnx.update(fresh, checkpointer.restore(path, nnx.state(fresh)))
    else:
        path.write_bytes(flax.serialization.to_bytes(state))
        nnx.update(fresh, flax.serialization.from_bytes(nnx.to_pure_dict(nnx.state(fresh)), path.read_bytes()))
    _assert_same_tensors(torchleaf.state_dict(fresh), torchleaf.state_dict(model))
    if store in ("orbax", "msgpack"):  # torch's state dicts lack buffers that are not persistent
        assert_trees_close(nnx.to_pure_dict(nnx.state(fresh)), state, rtol=0, atol=0)


# --- the package ---------------------------------------------------------------------------------


def test_documents_every_argument():
    for function in (TorchModule.__init__, TorchModule.__call__):
        for name in inspect.signature(function).parameters.keys() - {"self", "args", "kwargs"}:
            assert f"`{name}`" in function.__doc__, name


def test_collections_have_names_of_their_own():
    assert [nnx.variable_name_from_type(t) for t in (Frozen, Buffer)] == ["frozen", "buffers"]


@pytest.mark.long
def test_imports_after_another_library_has_taken_the_names():
    """nnx.bridge.ToNNX makes types for the collections of a Linen module."""
    printed = run_python(
        """
        from flax import nnx
        nnx.variable_type_from_name("frozen", allow_register=True)
        import torch, torchleaf
        linear = torch.nn.Linear(2, 2).requires_grad_(False)
        print(type(torchleaf.nnx.TorchModule(linear).weight).__name__)
        """
    )
    assert printed.split() == ["Frozen"]
