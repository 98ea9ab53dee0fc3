"""Modules that draw random numbers: one key drives all of a call, in training mode and only there."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import weighted_sum
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
KEY, OTHER = jax.random.key(0), jax.random.key(2)


class Variational(nn.Module):
    """An autoencoder that samples its code by `rsample`."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 4), nn.Linear(2, 8)

    def forward(self, x):
        mean, spread = self.encode(x).chunk(2, -1)
        return self.decode(torch.distributions.Normal(mean, spread.exp(), validate_args=False).rsample())


class StochasticDepth(nn.Module):
    """Skips its block for random examples, as vision models do."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(8, 8)

    def forward(self, x):
        if not self.training:
            return x + self.block(x)
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(0.5)
        return x + self.block(x) * keep.div_(0.5)


class OwnGenerator(nn.Module):
    """Draws from a generator it holds."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator) if self.training else x


def _recurrent(kind):
    return lambda: kind(8, 5, num_layers=2, dropout=0.5, batch_first=True)


def _encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), 2)


# Each is called on f32[3, 4, 8].
MODULES = {
    "Dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)),
    "Dropout-inplace": lambda: nn.Dropout(0.5, inplace=True),
    "Dropout1d": lambda: nn.Dropout1d(0.5),
    "Dropout2d": lambda: nn.Sequential(nn.Unflatten(2, (4, 2)), nn.Dropout2d(0.5), nn.Flatten(2)),
    "Dropout3d": lambda: nn.Sequential(nn.Unflatten(2, (2, 2, 2)), nn.Dropout3d(0.5), nn.Flatten(2)),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "RReLU": nn.RReLU,
    "LSTM": _recurrent(nn.LSTM),
    "GRU": _recurrent(nn.GRU),
    "RNN": _recurrent(nn.RNN),
    "Transformer": _encoder,
    "StochasticDepth": StochasticDepth,
    "OwnGenerator": OwnGenerator,
}
each = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture
def x():
    return torch.randn(3, 4, 8)


def assert_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)


def differ(a, b):
    return any(bool(jnp.any(p != q)) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- keys --------------------------------------------------------------------------------------------


@each
def test_numbers_follow_from_the_key(make, x):
    """Eager, compiled, from a copy; another key, other numbers; torch's generators stay where they are."""
    module = make()
    model, x, state = torchleaf.TorchModule(module), from_torch(x), torch.get_rng_state()
    drawn = model(x, key=KEY)
    assert_equal([eqx.filter_jit(model)(x, key=KEY), torchleaf.TorchModule(module)(x, key=KEY)], [drawn] * 2)
    assert differ(model(x, key=OTHER), drawn)
    assert torch.get_rng_state().equal(state)
    if isinstance(module, OwnGenerator):
        assert module.generator.get_state().equal(torch.Generator().manual_seed(3).get_state())


@each
def test_evaluation_mode_needs_no_key_and_minds_none(make, x):
    module = make()
    model = eqx.nn.inference_mode(torchleaf.TorchModule(module))
    expected = from_torch(copy.deepcopy(module).eval()(x))
    assert_trees_close([model(from_torch(x)), model(from_torch(x), key=KEY)], [expected] * 2)


SUBMODULES = {
    "Dropout": "submodule `1` (Dropout)",
    "LSTM": "LSTM draws",
    "Transformer": "submodule `layers.0",
    "OwnGenerator": "OwnGenerator draws",
}


@pytest.mark.parametrize(("name", "where"), SUBMODULES.items(), ids=SUBMODULES)
def test_without_a_key_the_error_names_op_and_submodule(name, where, x):
    model = torchleaf.TorchModule(MODULES[name]())
    with pytest.raises(torchleaf.RandomnessError, match=r"draws random numbers \(aten\.[\w.]+\).*Pass `key=`") as error:
        eqx.filter_jit(model)(from_torch(x))
    assert where in str(error.value)


@pytest.mark.long
@pytest.mark.usefixtures("each_remat")
@each
def test_gradients_have_the_mask_of_the_forward(make, x):
    """By a weight of each element: kept graphs and recomputed ones, checkpoints and forward mode agree."""
    module, x = make(), from_torch(x)

    def loss_of(residuals):
        model = torchleaf.TorchModule(module, residuals=residuals)
        params, static = eqx.partition(model, torchleaf.trainable(model))
        return params.params, lambda weights, x: weighted_sum(
            eqx.combine(eqx.tree_at(lambda m: m.params, params, weights), static)(x, key=KEY)
        )

    weights, live = loss_of("live")
    _, recompute = loss_of("recompute")
    eager = jax.grad(live, (0, 1))(weights, x)
    compiled = jax.jit(jax.grad(jax.checkpoint(live), (0, 1)))(weights, x)
    assert_trees_close([compiled, jax.jit(jax.grad(recompute, (0, 1)))(weights, x)], [eager] * 2, rtol=1e-4, atol=1e-5)
    value, slope = jax.jvp(lambda x: live(weights, x), (x,), (jnp.cos(x),))
    assert_trees_close([value, slope], [live(weights, x), jnp.vdot(eager[1], jnp.cos(x))], rtol=1e-4, atol=1e-4)


def test_dropped_inputs_get_no_gradient():
    model = torchleaf.TorchModule(nn.Dropout(0.5))
    x = jnp.ones(200)
    y, pull = jax.vjp(lambda x: model(x, key=KEY), x)
    assert_equal(pull(jnp.ones(200))[0], y)  # both are 2 where kept, 0 where dropped
    assert set(np.unique(y)) == {0, 2}


# --- inside models -----------------------------------------------------------------------------------


def test_sequential_gives_each_layer_a_key():
    """As Equinox's own layers are given; equal layers drop differently."""
    layer = torchleaf.TorchModule(nn.Dropout(0.5))
    model = eqx.nn.Sequential([layer, eqx.nn.Dropout(0.5), layer])
    x, keys = jnp.ones(500), jax.random.split(KEY, 3)
    y = eqx.filter_jit(model)(x, key=KEY)
    assert_equal(y, layer(eqx.nn.Dropout(0.5)(layer(x, key=keys[0]), key=keys[1]), key=keys[2]))
    assert 0 < (y != 0).sum() < 150  # an eighth is kept, not a quarter


def test_key_and_state_in_one_call(x):
    """Buffers from the State, the mask from the key."""
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8))
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
    x = from_torch(x.reshape(12, 8))
    y, state = eqx.filter_jit(lambda m, x, s: m(x, s, key=KEY))(model, x, state)
    dropped = torchleaf.TorchModule(nn.Dropout(0.5))(x, key=KEY)
    assert_trees_close(y, from_torch(module[1](torch.tensor(dropped.tolist()))), atol=1e-5)
    assert_trees_close(state.get(model.buffer_index)["1.running_mean"], from_torch(module[1].running_mean))


@each
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")
def test_examples_draw_from_keys_of_their_own(make, x):
    model, keys, xs = torchleaf.TorchModule(make()), jax.random.split(KEY, 3), from_torch(x[:, None])
    ys = jax.vmap(lambda x, key: model(x, key=key))(xs, keys)
    singles = [model(x, key=key) for x, key in zip(xs, keys, strict=True)]
    assert_trees_close(ys, jax.tree.map(lambda *rows: jnp.stack(rows), *singles), rtol=1e-4, atol=1e-5)


def test_ensembles_draw_from_keys_of_their_own(x):
    members = [torchleaf.TorchModule(MODULES["Dropout"]()) for _ in range(3)]
    keys, x = jax.random.split(KEY, 3), from_torch(x)
    ensemble = eqx.filter_vmap(lambda m, x, key: m(x, key=key), in_axes=(eqx.if_array(0), None, 0))
    expected = jnp.stack([member(x, key=key) for member, key in zip(members, keys, strict=True)])
    assert_trees_close(eqx.filter_jit(ensemble)(torchleaf.stack(members), x, keys), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")
def test_variational_autoencoder(x):
    """Samples per example under vmap, reparameterised gradients, reproducible training."""
    model = torchleaf.TorchModule(Variational())
    xs, keys = from_torch(x.reshape(12, 8)), jax.random.split(KEY, 12)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, keys):
        return jnp.mean((jax.vmap(lambda x, key: model(x, key=key))(xs, keys) - xs) ** 2)

    value, grads = loss(model, keys)
    assert_equal(loss(model, keys), (value, grads))
    singles = [jnp.mean((model(x, key=key) - x) ** 2) for x, key in zip(xs, keys, strict=True)]
    assert_trees_close(value, jnp.mean(jnp.stack(singles)))
    assert all(bool(jnp.any(g != 0)) for g in grads.params.values())
    assert loss(model, jax.random.split(OTHER, 12))[0] != value


@pytest.mark.long
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_training_with_split_keys_repeats(residuals, x):
    """A scan over steps and a loop of compiled steps give the same weights; another seed gives others."""
    model = torchleaf.TorchModule(MODULES["Dropout"](), residuals=residuals)
    params, static = eqx.partition(model, torchleaf.trainable(model))
    x, optimizer = from_torch(x), optax.sgd(0.1)

    def step(params, key):
        def loss(params):
            return jnp.mean(eqx.combine(params, static)(x, key=key) ** 2)

        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
        return eqx.apply_updates(params, updates), None

    def train(key):
        return jax.jit(lambda params, keys: jax.lax.scan(step, params, keys)[0])(params, jax.random.split(key, 10))

    looped, compiled = params, jax.jit(step)
    for key in jax.random.split(KEY, 10):
        looped, _ = compiled(looped, key)
    assert_trees_close(train(KEY).params, looped.params, rtol=1e-5)
    assert differ(train(OTHER).params, looped.params)


def test_steps_have_independent_masks():
    """Of one position, over 800 steps: kept half the time, whatever was kept before."""
    model = torchleaf.TorchModule(nn.Dropout(0.5))
    _, kept = jax.lax.scan(lambda c, key: (c, model(jnp.ones(3), key=key) != 0), None, jax.random.split(KEY, 800))
    signs = np.where(np.asarray(kept), 1.0, -1.0)
    assert (abs(signs.mean(0)) < 5 / np.sqrt(800)).all()
    assert (abs((signs[1:] * signs[:-1]).mean(0)) < 5 / np.sqrt(800)).all()


# --- attention ---------------------------------------------------------------------------------------


def test_attention_has_arguments_named_key(x):
    """By keyword they are its own; positionally, `key=` is the PRNG key."""
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    q, k, v = (from_torch(t) for t in (x, x + 1, x - 1))
    evaluating = torchleaf.TorchModule(copy.deepcopy(module).eval())
    expected = from_torch(copy.deepcopy(module).eval()(x, x + 1, x - 1))
    assert_trees_close(evaluating(query=q, key=k, value=v), expected, atol=1e-5)
    model = torchleaf.TorchModule(module)
    for key in (KEY, jax.random.PRNGKey(0)):
        drawn = model(q, k, v, key=key)
        assert_equal(eqx.filter_jit(model)(q, k, v, key=key), drawn)
        assert_equal(drawn, model(q, k, v, key=KEY))
    assert differ(model(q, k, v, key=OTHER), drawn)
    with pytest.raises(torchleaf.RandomnessError):
        model(query=q, key=k, value=v)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_weights_are_dropped_in_forward_and_backward(need_weights, x):
    """With one value per key, the output tells which weights were kept; so does the gradient by the values."""
    module = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True, bias=False)
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(8))
    model, q = torchleaf.TorchModule(module), from_torch(x)
    function = jax.jit(lambda v: model(q, q, v, key=KEY, need_weights=need_weights)[0])
    v = jnp.ones_like(q)
    y, pushed = jax.jvp(function, (v,), (v,))
    assert_trees_close(pushed, y, atol=1e-5)  # linear in the values, mask and all
    _, pull = jax.vjp(function, v)
    assert_trees_close(jnp.vdot(pull(jnp.cos(y))[0], v), jnp.vdot(jnp.cos(y), y), rtol=1e-4)
    assert (y == 0).any()


# --- compiled modules --------------------------------------------------------------------------------


def test_torch_compiled_modules_draw_from_the_key(x):
    """torch.compile's own random numbers would not be the key's, so a module that draws runs uncompiled."""
    module = MODULES["Dropout"]()
    compiled = torchleaf.TorchModule(torch.compile(module, backend="eager"))
    plain, state = torchleaf.TorchModule(module), torch.get_rng_state()
    for run in (compiled, eqx.filter_jit(compiled)):
        assert_trees_close(run(from_torch(x), key=KEY), plain(from_torch(x), key=KEY), atol=1e-6)
    with pytest.raises(torchleaf.RandomnessError):
        compiled(from_torch(x))
    grads = eqx.filter_grad(lambda m: weighted_sum(m(from_torch(x), key=KEY)))
    found = {name.removeprefix("_orig_mod."): g for name, g in grads(compiled).params.items()}
    assert_trees_close(found, grads(plain).params, rtol=1e-4)
    assert torch.get_rng_state().equal(state)


def test_torch_checkpoints_in_a_module_are_refused():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    with pytest.raises(torchleaf.TorchCallError, match=r"torch\.utils\.checkpoint.*jax\.checkpoint"):
        torchleaf.TorchModule(Checkpointed())(jnp.ones(8), key=KEY)


def test_functional_dropout_in_training_mode_only(x):
    """`F.dropout(x, training=self.training)` follows the mode; plain `F.dropout(x)` always drops, as in torch."""

    class Follows(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    class Always(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5)

    x = from_torch(x)
    for module, drops in ((Follows(), False), (Always(), True)):
        model = eqx.nn.inference_mode(torchleaf.TorchModule(module))
        assert differ(model(x, key=KEY), x) == drops
