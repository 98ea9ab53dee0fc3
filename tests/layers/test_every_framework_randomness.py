"""Random numbers follow from the key alone, in every framework."""

import copy

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch
from frameworks import eager_and_jit, every_framework
from stateful_layers import assert_equal
from torch import nn
from torchleaf import RandomnessError

pytestmark = [every_framework, pytest.mark.both_engines(every=4)]

KEY, OTHER = jax.random.key(0), jax.random.key(1)

# Each is called on f32[3, 4, 8].
MODULES = {
    "Dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)),
    "RReLU": nn.RReLU,
    "LSTM": lambda: nn.LSTM(8, 8, num_layers=2, dropout=0.5),
    "Transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
}
each = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture
def x():
    return from_torch(torch.randn(3, 4, 8))


def _differ(a, b):
    return any(bool(jnp.any(p != q)) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@each
@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_the_same_key_draws_the_same_numbers(framework, make, raw, x):
    """Eager, compiled, in another model of the module; another key, other numbers; torch's generator stays put."""
    key, other = (jax.random.key_data(k) if raw else k for k in (KEY, OTHER))
    module = make()
    model, state = framework(module), torch.get_rng_state()
    drawn = model(x, key=key)
    compiled = model.jit(lambda m, x, key: m(x, key=key))
    assert_equal([model(x, key=key), framework(module)(x, key=key), compiled(x, key)], [drawn] * 3)
    assert _differ(model(x, key=other), drawn)
    assert _differ(compiled(x, other), drawn)
    assert torch.get_rng_state().equal(state)


@each
def test_evaluation_mode_needs_no_key_and_minds_none(framework, make, x):
    module = make()
    model = framework(module).in_mode(training=False)
    expected = from_torch(copy.deepcopy(module).eval()(torch.tensor(x.tolist())))
    assert_trees_close([model(x), model(x, key=KEY)], [expected] * 2)


@eager_and_jit
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_have_the_mask_of_the_forward(framework, residuals, jit):
    def loss(model, x):
        y = model(x, key=KEY)
        return y.sum(), y

    model = framework(nn.Dropout(0.5), residuals=residuals)
    grads = model.maybe_jit(lambda m, x: m.gradients(loss, x), jit=jit)(jnp.ones(1000))
    assert_equal(grads.inputs, [grads.aux])
    assert 0 < (grads.aux == 0).mean() < 1


@each
@pytest.mark.filterwarnings("ignore:vmap of (LSTM|RReLU)")  # they run as a loop
def test_examples_draw_from_keys_of_their_own(framework, make, x):
    model, keys = framework(make()), jax.random.split(KEY, 3)
    xs = jnp.stack([x, x, 2 * x])
    ys = model.vmap(lambda m, x, key: m(x, key=key))(xs, keys)
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *(model(x, key=k) for x, k in zip(xs, keys, strict=True)))
    assert_trees_close(ys, expected)
    assert _differ(jax.tree.leaves(ys)[0][0], jax.tree.leaves(ys)[0][1])


def test_members_of_an_ensemble_draw_from_keys_of_their_own(framework, x):
    modules = [MODULES["Dropout"]() for _ in range(3)]
    models, keys = [framework(m) for m in modules], jax.random.split(KEY, 3)
    ensemble = framework.stack(models)
    ys = ensemble.vmap_members(lambda m, key: m(x, key=key), in_axes=0)(keys)
    assert_trees_close(ys, jnp.stack([m(x, key=k) for m, k in zip(models, keys, strict=True)]))


@eager_and_jit
def test_key_and_state_in_one_call(framework, jit, x):
    module = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model = framework(module, with_state=True)
    call = model.maybe_jit(lambda m, x: m(x, key=KEY), jit=jit)
    first, second = call(x), call(x)
    assert_equal(first, second)  # batch statistics do not depend on the state
    assert jnp.any(model.weights.buffers["2.running_mean"])
    assert model.weights.buffers["2.num_batches_tracked"] == 2


@eager_and_jit
@pytest.mark.parametrize(
    ("module", "where"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), r"bernoulli.*drawn in submodule `1` \(Dropout\)"),
        (lambda: nn.TransformerEncoderLayer(3, 1, 4), r"bernoulli.*drawn in submodule `self_attn` \(Multihead"),
        (lambda: nn.RReLU(), "rrelu"),
        (lambda: nn.LSTM(3, 2, num_layers=2, dropout=0.5), "bernoulli"),
    ],
    ids=["Dropout", "TransformerEncoderLayer", "RReLU", "LSTM"],
)
def test_randomness_without_a_key_is_refused_in_training_and_absent_in_inference(framework, jit, module, where):
    module, x = module(), jnp.ones((2, 3))
    model, name = framework(module), type(module).__name__
    with pytest.raises(RandomnessError, match=rf"{name} draws random numbers \(aten\.{where}") as error:
        model.maybe_jit(lambda m, x: m(x), jit=jit)(x)
    assert framework.key_remedy in str(error.value)
    assert "evaluation mode" in str(error.value)
    output = model.in_mode(training=False).maybe_jit(lambda m, x: m(x), jit=jit)(x)
    assert jnp.all(jnp.isfinite(jax.tree.leaves(output)[0]))


@pytest.mark.parametrize("module", [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.LSTM(3, 2, dropout=0.0)])
def test_dropout_that_drops_nothing_is_no_randomness(framework, module):
    framework(module)(jnp.ones((2, 3)))
