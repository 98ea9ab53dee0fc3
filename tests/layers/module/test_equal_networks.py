"""Two networks of one class are one tree structure, and share traces; all that changes what they compute counts."""

import copy
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import TiedAutoencoder
from flax import nnx
from frameworks import every_framework
from reentering_layers import Reversible
from scripted_layers import scripted
from small_transformers import bert, gpt2, llama, vit
from torch import nn
from torch.nn.utils import parametrizations
from torchleaf import TorchModule
from untouched import unchanged
from whole_copies import CLOSURES, PATCHES, Holder, Through, _module, _patched

X = torch.linspace(-1.5, 2, 6).reshape(2, 3)


class _Configured(nn.Module):
    """Has attributes of every kind."""

    def __init__(self, **changed):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))
        self.scale, self.names, self.table = 2.0, ["a", "b"], {"x": (1, 2.0)}
        self.constant, self.array = torch.arange(3.0), np.arange(3)
        self.config = Holder(width=3, nested=Holder(flag=True))
        self.activation = torch.tanh
        for name, value in changed.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.activation(self.linear(x)) * self.scale + self.shift + self.constant


def _lambda(slope):
    module = Through()
    module.f = lambda x: nn.functional.leaky_relu(module.linear(x), slope)
    return module


def _hooked(factor):
    module = nn.Linear(3, 3)
    module.register_forward_hook(lambda part, args, output: output * factor)
    return module


def _gradient_hook(factor):
    module = nn.Linear(3, 3)
    module.weight.register_hook(lambda grad: grad * factor)
    return module


def _tied(tied):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if tied:
        module[1].weight = module[0].weight
    return module


def _in_mode(part):
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Dropout())
    module[part].eval()
    return module


def _local_class(power):
    class Local(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** power

    return Local(3, 3)


ALIKE = {
    "linear": lambda: nn.Linear(3, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3)),
    "attributes": _Configured,
    "tied": lambda: TiedAutoencoder(5, 3),
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "closure": lambda: _lambda(0.1),
    "method": lambda: _module(CLOSURES["bound method"]),
    "patched": lambda: _patched(PATCHES["method"]),
    "hook": lambda: _hooked(2.0),
    "gradient hook": lambda: _gradient_hook(2.0),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "local class": lambda: _local_class(2),
    "scripted": lambda: nn.Sequential(scripted(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))),
    "graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
    "function": Reversible,
}

DIFFERENT = {
    "width": (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 3)),
    "class": (lambda: nn.ReLU(), lambda: nn.Tanh()),
    "hyperparameter": (lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
    "flag": (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3, bias=False)),
    "dtype": (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3).half()),
    "frozen": (lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3).requires_grad_(False)),
    "mode of a part": (lambda: _in_mode(1), lambda: _in_mode(2)),
    "order": (lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), lambda: nn.Sequential(nn.Tanh(), nn.ReLU())),
    "tie": (lambda: _tied(True), lambda: _tied(False)),
    "closure value": (lambda: _lambda(0.1), lambda: _lambda(0.2)),
    "closure code": (lambda: _module(CLOSURES["lambda"]), lambda: _module(CLOSURES["default"])),
    "hook": (lambda: nn.Linear(3, 3), lambda: _hooked(2.0)),
    "hook value": (lambda: _hooked(2.0), lambda: _hooked(3.0)),
    "gradient hook": (lambda: nn.Linear(3, 3), lambda: _gradient_hook(2.0)),
    "gradient hook value": (lambda: _gradient_hook(2.0), lambda: _gradient_hook(3.0)),
    "captured by a class": (lambda: _local_class(2), lambda: _local_class(3)),
    "number": (_Configured, lambda: _Configured(scale=2)),
    "list": (_Configured, lambda: _Configured(names=["a", "c"])),
    "dict": (_Configured, lambda: _Configured(table={"x": (1, 2.5)})),
    "tensor": (_Configured, lambda: _Configured(constant=torch.tensor([0.0, 1, 3]))),
    "array": (_Configured, lambda: _Configured(array=np.arange(1, 4))),
    "object": (_Configured, lambda: _Configured(config=Holder(width=3, nested=Holder(flag=False)))),
    "function": (_Configured, lambda: _Configured(activation=torch.sin)),
    "more": (_Configured, lambda: _Configured(more=None)),
    "unlike objects": (lambda: _Configured(config=object()), lambda: _Configured(config=object())),
}

pytestmark = [pytest.mark.both_engines(every=4), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


def _structure(model):
    """What JAX compares of a model."""
    match model:
        case TorchModule():
            return jax.tree.structure(model)
        case torchleaf.nnx.TorchModule():
            return nnx.split(model)[0]
    return model.made.module


def _make(framework, module, **options):
    wrapped = framework(module, **options)
    return getattr(wrapped, "model", None) or wrapped.module


@every_framework
@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_networks_built_alike_are_equal(framework, make):
    one, other = make(), make()
    models = [_make(framework, module) for module in (one, other)]
    structures = [_structure(model) for model in (*models, copy.deepcopy(models[0]))]
    assert structures[0] == structures[1] == structures[2]
    assert hash(structures[0]) == hash(structures[1]) == hash(structures[2])


@every_framework
@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT)
def test_networks_that_compute_otherwise_are_not(framework, first, second):
    one, other = (_structure(_make(framework, make())) for make in (first, second))
    assert one != other
    assert one == _structure(_make(framework, first())) or first().__class__ is _Configured


@pytest.mark.parametrize("option", [{"vmap_method": "loop"}, {"replay": False}, {"residuals": "recompute"}])
@every_framework
def test_options_tell_apart(framework, option):
    one, other = _make(framework, nn.Linear(3, 3)), _make(framework, nn.Linear(3, 3), **option)
    assert _structure(one) != _structure(other)


@pytest.mark.parametrize("make", [bert, gpt2, llama, vit], ids=lambda make: make.__name__)
def test_transformers(make):
    assert TorchModule(make()).module == TorchModule(make()).module


# --- what it is for ------------------------------------------------------------------------------


def test_target_networks_and_averages():
    online, target = (TorchModule(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval())) for _ in range(2))

    def blend(x, y):
        return 0.9 * x + 0.1 * y if eqx.is_inexact_array(x) else x

    blended = jax.tree.map(blend, online, target)
    assert_trees_close(blended.params, jax.tree.map(blend, online.params, target.params))
    params, static = eqx.partition(target, eqx.is_inexact_array)
    averaged = optax.incremental_update(eqx.filter(online, eqx.is_inexact_array), params, 0.1)
    assert_trees_close(
        eqx.combine(averaged, static).params, jax.tree.map(lambda x, y: 0.1 * x + 0.9 * y, online.params, target.params)
    )


def test_cond_between_models():
    one, other = (TorchModule(nn.Linear(3, 3)) for _ in range(2))
    arrays = [eqx.filter(m, eqx.is_array) for m in (one, other)]
    static = eqx.filter(one, eqx.is_array, inverse=True)
    x = from_torch(X)

    @jax.jit
    def call(flag, x):
        chosen = jax.lax.cond(flag, lambda: arrays[0], lambda: arrays[1])
        return eqx.combine(chosen, static)(x)

    assert_trees_close(call(True, x), one(x))
    assert_trees_close(call(False, x), other(x))


def test_nnx_models_in_tree_map():
    one, other = (torchleaf.nnx.TorchModule(nn.Linear(3, 3)) for _ in range(2))
    graphdef, state = nnx.split(one)
    blended = jax.tree.map(lambda x, y: 0.5 * x + 0.5 * y, state, nnx.state(other))
    both = [m(from_torch(X)) for m in (one, other)]
    assert_trees_close(nnx.merge(graphdef, blended)(from_torch(X)), 0.5 * both[0] + 0.5 * both[1])


@pytest.mark.torch_engine  # which traces once
def test_equal_models_share_a_trace():
    traces = []

    class Counted(nn.Linear):
        def forward(self, x):
            traces.append(type(x).__name__)
            return super().forward(x)

    models = [TorchModule(Counted(3, 3)) for _ in range(3)]
    compiled = eqx.filter_jit(lambda m, x: m(x))
    for model in models:
        for call in (compiled, lambda m, x: m(x)):
            twin = torchleaf.to_torch_module(model)
            assert_trees_close(call(model, from_torch(X)), from_torch(twin(X)))
    assert traces.count("FakeTensor") == 1


def test_models_by_threads_have_one_canonical():
    from concurrent.futures import ThreadPoolExecutor

    models = [TorchModule(_Configured()) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda m: m.module.canonical, models))
    assert len({id(m) for m in found}) == 1


def test_the_weights_of_an_equal_module_are_foreign_too():
    """Whichever of the two was traced first."""
    instances = []

    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return instances[-1].linear(x)

    for _ in range(2):
        instances.append(Global())
        with pytest.raises(torchleaf.TorchCallError, match="the module that was wrapped"):
            TorchModule(instances[-1])(from_torch(X))


def test_a_constant_of_an_equal_module_stays_its_own():
    """Equal when they were wrapped; what the user does to the torch module afterwards changes neither."""
    one, other = _Configured(), _Configured()
    models = [TorchModule(m, copy=True) for m in (one, other)]
    assert models[0].module == models[1].module
    expected = [from_torch(m(X)) for m in (one, other)]
    one.constant.add_(1)
    other.scale = 100.0
    for model, y in zip(models, expected, strict=True):
        assert_trees_close(model(from_torch(X)), y)
    assert TorchModule(one).module != models[0].module


def test_stacking():
    members = [TorchModule(_lambda(0.1)) for _ in range(3)]
    ensemble = torchleaf.stack(members)
    outputs = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(ensemble, from_torch(X))
    assert_trees_close(outputs, jnp.stack([m(from_torch(X)) for m in members]))
    with pytest.raises(ValueError, match=r"the torch module of models\[1\] differs"):
        torchleaf.stack([members[0], TorchModule(_lambda(0.2))])  # torch prints them alike


def test_nothing_is_kept_alive():
    model = TorchModule(_Configured(names=["alone"]))
    model(from_torch(X))
    reference = weakref.ref(model.module.canonical)
    del model
    jax.clear_caches()
    gc.collect()
    assert reference() is None


def test_deepcopy_shares_the_code():
    module = _Configured()
    model = TorchModule(module)
    with unchanged(model, torch_module=module):
        twin = copy.deepcopy(model)
    assert twin.module is model.module
    assert eqx.tree_equal(twin, model)
    assert all(a is not b for a, b in zip(jax.tree.leaves(twin.params), jax.tree.leaves(model.params), strict=True))
