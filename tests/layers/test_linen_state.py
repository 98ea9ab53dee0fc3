"""State, random numbers and modes of the Linen `TorchModule`."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from linen_models import by_torch_name, mixed
from torch import nn as tnn

pytestmark = pytest.mark.both_engines(every=4)
TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


# --- state ---------------------------------------------------------------------------------------


@eager_and_jit
def test_statistics_follow_those_of_torch(jit):
    module = tnn.Sequential(tnn.Linear(3, 4), tnn.BatchNorm1d(4), tnn.Linear(4, 2))
    model = TorchModule(copy.deepcopy(module), copy_weights=True)
    variables = model.init(KEY, jnp.ones((5, 3)))
    apply = jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))
    for _ in range(3):
        x = 2 * torch.randn(8, 3) + 1
        y, updates = apply(variables, from_torch(x))
        assert updates.keys() == {"batch_stats"}
        variables |= updates
        assert_trees_close(y, from_torch(module(x)))
        assert_trees_close(by_torch_name(updates), from_torch(dict(module.named_buffers())))
    x = torch.randn(8, 3)
    assert_trees_close(model.apply(variables, from_torch(x), train=False), from_torch(module.eval()(x)))


class _Stateful(tnn.Module):
    """Statistics and another buffer that changes."""

    def __init__(self):
        super().__init__()
        self.norm = tnn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unused", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x) * self.calls


def test_every_collection_that_changes_has_to_be_mutable():
    model, x = TorchModule(_Stateful()), jnp.arange(12.0).reshape(4, 3)
    variables = model.init(KEY, x)
    assert float(variables["buffers"]["calls"]) == 0
    with pytest.raises(torchleaf.StateError, match=r'mutable=\["batch_stats", "buffers"\]'):
        model.apply(variables, x)
    with pytest.raises(torchleaf.StateError, match=r"`calls` .* 'buffers' is not mutable"):
        model.apply(variables, x, mutable=["batch_stats"])
    _, updates = model.apply(variables, x, mutable=["batch_stats", "buffers"])
    assert float(updates["buffers"]["calls"]) == 1
    assert jnp.array_equal(updates["buffers"]["unused"], variables["buffers"]["unused"])
    assert int(updates["batch_stats"]["norm"]["num_batches_tracked"]) == 1
    _, everything = model.apply(variables, x, mutable=True)
    assert everything.keys() == {"params", "batch_stats", "buffers"}


def test_evaluation_needs_nothing_mutable():
    model, x = TorchModule(mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    assert model.apply(variables, x, train=False).shape == (5, 2)
    _, updates = model.apply(variables, x, train=False, mutable=["batch_stats"])
    assert_trees_close(updates["batch_stats"], variables["batch_stats"], rtol=0, atol=0)


# --- random numbers ------------------------------------------------------------------------------


@eager_and_jit
def test_dropout_draws_from_its_stream(jit):
    model, x = TorchModule(tnn.Dropout(0.5)), jnp.ones((50, 20))
    apply = jit(lambda key: model.apply({}, x, rngs={"dropout": key}))
    y, again, other = apply(KEY), apply(KEY), apply(jax.random.key(1))
    assert_trees_close(y, again, rtol=0, atol=0)
    assert not jnp.array_equal(y, other)
    assert set(np.unique(y)) == {0.0, 2.0}


def test_without_a_stream_the_error_names_it():
    model, x = TorchModule(mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    with pytest.raises(torchleaf.RandomnessError, match=r'rngs=\{"dropout": key\}.*submodule `2` \(Dropout\)'):
        model.apply(variables, x, mutable=["batch_stats"])
    noisy = TorchModule(tnn.Dropout(0.5), rng_collection="noise")
    with pytest.raises(torchleaf.RandomnessError, match=r'rngs=\{"noise": key\}'):
        noisy.apply({}, x, rngs={"dropout": KEY})
    assert noisy.apply({}, x, rngs={"noise": KEY}).shape == x.shape


def test_params_stand_in_for_the_stream_as_in_flax():
    model, x = TorchModule(tnn.Dropout(0.5)), jnp.ones((5, 3))
    by_params = model.apply({}, x, rngs={"params": KEY})
    assert_trees_close(by_params, model.apply({}, x, rngs=KEY), rtol=0, atol=0)
    assert_trees_close(by_params, model.init_with_output(KEY, x)[0], rtol=0, atol=0)


def test_layers_draw_different_numbers_and_only_those_who_draw_move_the_stream():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            silent = TorchModule(tnn.Linear(3, 3), name="silent")
            dropout = TorchModule(tnn.Dropout(0.5), name="dropout")
            other = TorchModule(tnn.Dropout(0.5), name="other")
            silent(x)
            return dropout(x), dropout(x), other(x)

    x = jnp.ones((50, 3))
    variables = Model().init(KEY, x)
    one, two, three = Model().apply(variables, x, rngs={"dropout": KEY})
    assert not jnp.array_equal(one, two)
    assert not jnp.array_equal(one, three)

    class Dropouts(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = TorchModule(tnn.Sequential(tnn.Identity(), tnn.Dropout(0.5)), name="dropout")
            shared(x, train=False)
            return shared(x)

    assert_trees_close(Dropouts().apply({}, x, rngs={"dropout": KEY}), one, rtol=0, atol=0)


def test_a_torch_argument_named_key():
    module = tnn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    model, x = TorchModule(module), torch.randn(2, 4, 8)
    given = {"query": x, "key": 2 * x, "value": x}
    arrays = {name: from_torch(tensor) for name, tensor in given.items()}
    variables = model.init(KEY, **arrays)
    assert_trees_close(model.apply(variables, **arrays, train=False), from_torch(module.eval()(**given)))
    drawn = model.apply(variables, **arrays, rngs={"dropout": KEY})
    assert_trees_close(drawn, model.apply(variables, *arrays.values(), rngs={"dropout": KEY}), rtol=0, atol=0)


# --- train and deterministic ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "call", "training"),
    [
        ({}, {}, None),
        ({}, {"train": True}, True),
        ({}, {"train": False}, False),
        ({}, {"deterministic": True}, False),
        ({}, {"deterministic": False}, True),
        ({"train": True}, {}, True),
        ({"train": False}, {}, False),
        ({"deterministic": True}, {}, False),
        ({"deterministic": False}, {}, True),
        ({"deterministic": False}, {"train": True}, True),
        ({"train": False}, {"deterministic": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapped_in", [True, False], ids=["training", "evaluation"])
def test_modes(fields, call, training, wrapped_in):
    class Mode(tnn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.training

    model = TorchModule(Mode().train(wrapped_in), **fields)
    expected = wrapped_in if training is None else training
    assert float(model.apply({}, jnp.zeros(()), **call)) == expected


@pytest.mark.parametrize(
    ("fields", "training"), [({}, True), ({"train": False}, False), ({"deterministic": True}, False)]
)
def test_to_torch_module_follows_the_fields(fields, training):
    assert torchleaf.to_torch_module(TorchModule(tnn.Dropout(0.5), **fields), {}).training is training


@pytest.mark.parametrize(
    ("fields", "call", "error", "message"),
    [
        ({"train": True}, {"train": True}, ValueError, "constructor and at call time"),
        ({}, {"train": True, "deterministic": True}, ValueError, "contradict"),
        ({"deterministic": True}, {"train": True}, ValueError, "contradict"),
    ],
)
def test_modes_that_contradict(fields, call, error, message):
    with pytest.raises(error, match=message):
        TorchModule(tnn.Identity(), **fields).apply({}, jnp.ones(3), **call)


@pytest.mark.usefixtures("no_type_checks")
def test_a_traced_mode_is_refused():
    model = TorchModule(tnn.Identity())
    with pytest.raises(TypeError, match=r"`train` is traced.*TorchModule\(module, train=\.\.\.\)"):
        jax.jit(lambda x, train: model.apply({}, x, train=train))(jnp.ones(3), True)


def test_a_forward_with_an_argument_named_train():
    class Own(tnn.Module):
        def forward(self, x: torch.Tensor, train: bool = False) -> torch.Tensor:
            return x + 10 * train + self.training

    model, x = TorchModule(Own().eval()), jnp.zeros(())
    assert float(model.apply({}, x, train=True)) == 10
    assert float(model.apply({}, x, train=True, deterministic=False)) == 11
    assert float(TorchModule(Own().eval(), train=True).apply({}, x)) == 1


def test_submodules_in_another_mode_stay_so():
    module = tnn.Sequential(tnn.Linear(3, 3), tnn.Dropout(0.5).eval())
    model, x = TorchModule(module), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    assert_trees_close(model.apply(variables, x), model.apply(variables, x, train=False), rtol=0, atol=0)
