"""Random numbers of torch functions follow from the key alone: the same wherever, however and whenever it is drawn."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close
from fresh_process import run_python
from random_functions import SAMPLERS, argument
from torch.utils.checkpoint import checkpoint

KEY, OTHER = jax.random.key(0), jax.random.key(1)
MASKS = {name: sampler for name, sampler in SAMPLERS.items() if sampler.masks}
DIFFERENTIABLE = {name: sampler for name, sampler in SAMPLERS.items() if sampler.masks or sampler.smooth}

may_loop = pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")


def each(samplers):
    return pytest.mark.parametrize("sampler", samplers.values(), ids=samplers)


def assert_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)


def differ(a, b):
    return bool(jnp.any(a != b))


@pytest.fixture
def x():
    return argument()


# --- the same key, the same numbers ------------------------------------------------------------------


@each(SAMPLERS)
def test_numbers_follow_from_the_key(sampler, x):
    """Drawn eagerly, compiled, again; others for another key. torch's generator stays where it is."""
    function = sampler()
    drawn = function(x, key=KEY)
    assert differ(function(x, key=OTHER), drawn)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_equal([function(x, key=KEY), jax.jit(sampler())(x, key=KEY)], [drawn] * 2)
    assert torch.get_rng_state().equal(before)


def test_a_generator_of_ones_own_stays_where_it_is(x):
    generator = torch.Generator().manual_seed(0)
    function = torchleaf.torch_function(lambda x: x + torch.rand(24, generator=generator))
    first, other = function(x, key=KEY), function(x, key=OTHER)
    assert differ(first, other)
    assert generator.get_state().equal(torch.Generator().manual_seed(0).get_state())


@each({name: SAMPLERS[name] for name in ("dropout", "randn", "multinomial", "Gamma")})
def test_loops_draw_as_single_calls(sampler, x):
    """scan and while_loop, with a key for each step."""
    function, keys = sampler(), jax.random.split(KEY, 4)
    expected = jnp.stack([function(x, key=key) for key in keys])
    assert_equal(jax.lax.scan(lambda c, key: (c, function(x, key=key)), None, keys)[1], expected)
    total = jax.lax.fori_loop(0, 4, lambda i, t: t + function(x, key=keys[i]), jnp.zeros_like(expected[0]))
    assert_trees_close(total, expected.sum(0))


def test_one_draw_after_another_differs_within_a_call(x):
    function = torchleaf.torch_function(lambda x: (torch.rand_like(x), torch.rand_like(x)))
    first, second = function(x, key=KEY)
    assert differ(first, second)


_DIGESTS = """
import hashlib
import json
import random
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from random_functions import SAMPLERS, argument


def draw_everything():
    results = [sampler()(argument(), key=jax.random.key(0)) for sampler in SAMPLERS.values()]
    many = torchleaf.torch_function(lambda x: [x.bernoulli_(0.3).clone(), x.exponential_(), torch.randn(10**5)])
    results += many(jnp.zeros(10**6), key=jax.random.key(0))
    results += jax.jit(lambda x, key: [jnp.sin(x), *many(x, key=key)])(jnp.zeros(10**6), jax.random.key(0))[1:]
    return [hashlib.sha256(np.asarray(r).tobytes()).hexdigest() for r in results]
"""


@pytest.mark.long
def test_another_process_with_more_threads_draws_the_same():
    """Short calls and long ones, which run elsewhere and on several cores; on one core here.

    Where no type checker draws random numbers either, the generators of NumPy and Python stay where they are.
    """
    here: dict[str, Any] = {}
    exec(_DIGESTS, here)
    script = """
torch.set_num_threads(2)
torch.manual_seed(5)
before = str((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))
print(json.dumps(draw_everything()))
assert str((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate())) == before
"""
    there = json.loads(run_python(_DIGESTS + script, PYTHONPATH=str(Path(__file__).parents[2] / "support")))
    assert there == here["draw_everything"]()


@pytest.mark.long
def test_threads_draw_while_torch_draws():
    """Eight threads with keys of their own, and torch's own stream in the main thread: each is what it is alone."""
    names = ("dropout", "native_dropout", "rand", "Normal", "multinomial")
    functions = [jax.jit(SAMPLERS[name]()) for name in names]
    x, keys = argument(), jax.random.split(KEY, 8)

    def draw(key):
        return [[f(x, key=k) for f in functions] for k in jax.random.split(key, 10)]

    torch.manual_seed(0)
    alone, own_stream = [draw(key) for key in keys], [torch.rand(3).tolist() for _ in range(2000)]
    torch.manual_seed(0)
    with ThreadPoolExecutor(8) as pool:
        together = [pool.submit(draw, key) for key in keys]
        assert [torch.rand(3).tolist() for _ in range(2000)] == own_stream
        assert_equal([t.result() for t in together], alone)


def test_ops_of_ones_own_that_say_they_are_random(x):
    """Custom ops draw from torch's generator alone; the tag tells torchleaf."""
    define = torch.library.custom_op(
        "torchleaf_tests::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
    )
    noise = define(_noise)
    noise.register_fake(torch.empty_like)
    function, state = torchleaf.torch_function(noise), torch.get_rng_state()
    drawn = function(x, key=KEY)
    assert_equal(jax.jit(function)(x, key=KEY), drawn)
    assert differ(function(x, key=OTHER), drawn)
    assert torch.get_rng_state().equal(state)
    with pytest.raises(torchleaf.RandomnessError, match="noise"):
        function(x)


def _noise(x: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(x)


@each({name: SAMPLERS[name] for name in ("dropout", "dropout2d", "alpha_dropout", "rand", "rrelu")})
def test_in_inference_mode(sampler, x):
    """Where torch does not take ops apart before they are seen."""
    function = torchleaf.torch_function(lambda x: torch.inference_mode()(sampler.function)(x).clone())
    assert_equal(function(x, key=KEY), sampler()(x, key=KEY))
    with pytest.raises(torchleaf.RandomnessError):
        function(x)


# --- batches -----------------------------------------------------------------------------------------


@each(SAMPLERS)
def test_each_example_draws_from_its_own_key(sampler, x):
    xs, keys = jnp.stack([x, x / 2, x / 3]), jax.random.split(KEY, 3)

    def batch(function):
        return jax.vmap(lambda x, key: function(x, key=key))(xs, keys)

    if sampler.loops:
        with pytest.warns(UserWarning, match="runs as a loop over 3 examples"):
            drawn = batch(sampler())
    else:
        drawn = batch(sampler())
    assert_equal(drawn, jnp.stack([sampler()(x, key=key) for x, key in zip(xs, keys, strict=True)]))


@may_loop
@each({name: SAMPLERS[name] for name in ("dropout", "dropout2d", "randn", "exponential_", "poisson", "randperm")})
@pytest.mark.parametrize("in_axes", [(None, 0), (0, None)], ids=["keys", "arguments"])
def test_what_is_not_batched_is_shared(sampler, x, in_axes):
    """One argument with several keys, and several arguments with one key: as in JAX, they share the mask."""
    xs, keys = jnp.stack([x, x / 2, x / 3]), jax.random.split(KEY, 3)
    args = (xs if in_axes[0] == 0 else x, keys if in_axes[1] == 0 else KEY)
    drawn = jax.vmap(lambda x, key: sampler()(x, key=key), in_axes)(*args)
    rows = [[a if d is None else a[i] for a, d in zip(args, in_axes, strict=True)] for i in range(3)]
    assert_equal(drawn, jnp.stack([sampler()(x, key=key) for x, key in rows]))


def test_batches_of_jax_share_alike(x):
    """Dropout written in JAX, with the same keys batched in the same way, drops elements in the same pattern."""
    xs, keys = jnp.stack([x, x, x]), jax.random.split(KEY, 3)
    ours = SAMPLERS["dropout"]()

    def theirs(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)

    for in_axes in [(0, 0), (0, None), (None, 0)]:
        args = (xs if in_axes[0] == 0 else x, keys if in_axes[1] == 0 else KEY)
        for function in (lambda x, key: ours(x, key=key), theirs):
            a, b, _ = jax.vmap(function, in_axes)(*args)
            assert differ(a, b) == (in_axes[1] == 0)


@may_loop
@each({name: SAMPLERS[name] for name in ("dropout",)})
@pytest.mark.parametrize("inner", [(0, 0), (None, 0), (0, None)], ids=["both", "keys", "arguments"])
@pytest.mark.parametrize("outer", [(0, 0), (None, 0), (0, None)], ids=["both", "keys", "arguments"])
def test_nested_batches(sampler, x, inner, outer):
    """Every combination of what is batched in which of two vmaps."""
    function, sizes = sampler(), (2, 3)
    full = (x / jnp.arange(1.0, 7.0).reshape(2, 3, 1), jax.random.split(KEY, sizes))
    args = [_first_along(a, (o, i)) for a, o, i in zip(full, outer, inner, strict=True)]
    drawn = jax.vmap(jax.vmap(lambda x, key: function(x, key=key), inner), outer)(*args)
    for a, b in np.ndindex(*sizes):
        row, key = (
            array[a if o == 0 else 0, b if i == 0 else 0] for array, o, i in zip(full, outer, inner, strict=True)
        )
        assert_equal(drawn[a, b], function(row, key=key))


def _first_along(array, dims):
    """What is not batched along an axis is the first row of it."""
    return array[tuple(0 if d is None else slice(None) for d in dims)]


@pytest.mark.parametrize("axis", [1, 2])
def test_examples_along_another_axis(axis):
    function = SAMPLERS["randn"]()
    (x,), keys = np.random.default_rng(0).normal(size=(1, 3, 4, 24)).astype(np.float32), jax.random.split(KEY, 4)
    batched, key_words = jnp.moveaxis(jnp.asarray(x[0]), 0, axis - 1), jax.random.key_data(keys)
    drawn = jax.vmap(lambda x, words: function(x, key=words), (axis - 1, 1))(batched, key_words.T)
    assert_equal(drawn, jnp.stack([function(row, key=key) for row, key in zip(x[0], keys, strict=True)]))


def test_native_batches_draw_once():
    """`vmap_method="batched"`: one call draws for all, from all keys; examples still differ, and repeat."""
    x, keys = jnp.ones((3, 24)), jax.random.split(KEY, 3)
    function = SAMPLERS["dropout"](vmap_method="batched")
    drawn = jax.vmap(lambda x, key: function(x, key=key))(x, keys)
    assert_equal(jax.jit(jax.vmap(lambda x, key: function(x, key=key)))(x, keys), drawn)
    assert len({row.tobytes() for row in np.asarray(drawn)}) == 3


def test_vmap_inside_the_torch_function(x):
    """torch.func.vmap with randomness of its own, alone and within jax.vmap."""
    noisy = torch.func.vmap(lambda row: row + torch.rand_like(row), randomness="different")
    function, keys = torchleaf.torch_function(lambda x: noisy(x.reshape(4, 6))), jax.random.split(KEY, 2)
    drawn = function(x, key=KEY) - x.reshape(4, 6)
    assert len({row.tobytes() for row in np.asarray(drawn)}) == 4
    batch = jax.vmap(lambda key: function(x, key=key))(keys)
    assert_equal(batch, jnp.stack([function(x, key=key) for key in keys]))


# --- derivatives -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_remat")
@each(DIFFERENTIABLE)
def test_backward_uses_the_numbers_of_the_forward(sampler, x):
    """Kept graphs, recomputed ones, JAX's checkpoints and forward mode have one derivative, eager and compiled."""
    functions = [sampler(), sampler(residuals="recompute"), jax.checkpoint(sampler())]
    out = functions[0](x, key=KEY)
    cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    grads = [jax.jit(jax.grad(lambda x, f=f: jnp.vdot(f(x, key=KEY), cotangent)))(x) for f in functions]
    grads.append(jax.vjp(lambda x: functions[0](x, key=KEY), x)[1](cotangent)[0])
    assert_trees_close(grads, [grads[0]] * 4)
    tangent = jnp.sin(jnp.arange(24.0))
    pushed = jax.jvp(lambda x: functions[0](x, key=KEY), (x,), (tangent,))
    assert_equal(pushed[0], out)
    assert_trees_close(jnp.vdot(pushed[1], cotangent), jnp.vdot(tangent, grads[0]), rtol=1e-4)
    assert differ(grads[0], 0)


@each(MASKS)
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_are_zero_where_outputs_are(sampler, x, residuals):
    function, keys = sampler(residuals=residuals), jax.random.split(KEY, 20)

    @jax.jit
    def dropped(key):
        out, pull = jax.vjp(lambda x: function(x, key=key), x)
        tangent = jax.jvp(lambda x: function(x, key=key), (x,), (jnp.ones(24),))[1]
        return out.ravel() == 0, pull(jnp.ones_like(out))[0] == 0, tangent.ravel() == 0

    masks = [dropped(key) for key in keys]
    for forward, gradient, tangent in masks:
        assert_equal([gradient, tangent], [forward, forward])
    kept = jnp.stack([forward for forward, *_ in masks])
    assert differ(kept, True)
    assert differ(kept, False)


def smooth_dropout(x):
    """Its second derivatives depend on the mask."""
    return (F.dropout(x, 0.5) ** 3).sum() + (torch.rand_like(x) * x.exp()).sum()


@pytest.mark.long
@may_loop
def test_second_derivatives(x):
    function = torchleaf.torch_function(smooth_dropout)

    def f(x):
        return function(x, key=KEY)

    diagonal = jax.jacrev(jax.grad(f))(x)
    assert_trees_close(diagonal, jnp.diag(jnp.diag(diagonal)))
    assert_trees_close([jax.hessian(f)(x), jax.jacfwd(jax.jacfwd(f))(x)], [diagonal] * 2, rtol=1e-4)
    hvp = jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1]
    assert_trees_close(hvp, diagonal @ jnp.cos(x), rtol=1e-4)


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad"])
def test_gradients_of_batches(x, residuals, order):
    """Each example's gradient has its own mask, whichever way round."""
    function = torchleaf.torch_function(smooth_dropout, residuals=residuals)
    xs, keys = jnp.stack([x, x / 2, x / 3]), jax.random.split(KEY, 3)

    def one(x, key):
        return function(x, key=key)

    grad = jax.vmap(jax.grad(one)) if order == "vmap of grad" else jax.grad(lambda xs, ks: jax.vmap(one)(xs, ks).sum())
    expected = jnp.stack([jax.grad(one)(x, key) for x, key in zip(xs, keys, strict=True)])
    assert_trees_close([grad(xs, keys), jax.jit(grad)(xs, keys)], [expected] * 2)


def test_weights_shared_by_examples_with_masks_of_their_own():
    """The gradient of a shared weight sums over examples, each with its mask."""
    function = torchleaf.torch_function(lambda w, x: (F.dropout(x) * w).sum())
    w, xs, keys = jnp.ones(5), jnp.ones((4, 5)), jax.random.split(KEY, 4)
    batch = jax.grad(lambda w: jax.vmap(lambda x, key: function(w, x, key=key))(xs, keys).sum())(w)
    dropped = jnp.stack([SAMPLERS["dropout"]()(x, key=key) for x, key in zip(xs, keys, strict=True)])
    assert_trees_close(batch, dropped.sum(0))


def test_torch_checkpoints_are_refused(x):
    """They would draw again in the backward pass, where no key is."""

    def function(x):
        return checkpoint(lambda y: F.dropout(y.sin()), x, use_reentrant=False)

    with pytest.raises(torchleaf.RandomnessError, match=r"inside torch.utils.checkpoint.*jax.checkpoint"):
        torchleaf.torch_function(function)(x, key=KEY)
    without = torchleaf.torch_function(lambda x: checkpoint(torch.sin, x, use_reentrant=False))
    assert_trees_close(jax.jit(jax.grad(lambda x: without(x, key=KEY).sum()))(x), jnp.cos(x))


# --- statistics --------------------------------------------------------------------------------------

# Counts of n draws lie within 5 standard deviations; the keys are fixed, so what passes once always passes.


def assert_rate(mask, rate):
    n = mask.size
    assert abs(float(mask.mean()) - rate) < 5 * np.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batched", [False, True], ids=["one-call", "vmap"])
def test_dropout_keeps_and_scales_as_it_says(rate, batched):
    function = torchleaf.torch_function(lambda x: F.dropout(x, rate))
    if batched:
        out = jax.vmap(lambda key: function(jnp.ones(100), key=key))(jax.random.split(KEY, 300))
    else:
        out = function(jnp.ones(30_000), key=KEY)
    kept = np.asarray(out) != 0
    assert_rate(kept, 1 - rate)
    np.testing.assert_allclose(np.asarray(out)[kept], 1 / (1 - rate), rtol=1e-6)


def test_masks_are_independent():
    """Of positions, of examples under vmap, of steps with split keys, of layers within a call: correlations vanish."""
    function = torchleaf.torch_function(lambda x: torch.stack([F.dropout(x), F.dropout(x)]))
    keys = jax.random.split(KEY, (20, 30))  # steps, examples
    _, out = jax.lax.scan(
        lambda c, ks: (c, jax.vmap(lambda key: function(jnp.ones(40), key=key))(ks)), None, keys
    )  # [step, example, layer, position]
    signs = np.where(np.asarray(out) != 0, 1.0, -1.0)
    for axis in range(4):
        a, b = np.take(signs, range(signs.shape[axis] - 1), axis), np.take(signs, range(1, signs.shape[axis]), axis)
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)


def test_feature_dropout_drops_whole_features():
    function = torchleaf.torch_function(lambda x: F.dropout2d(x, 0.25))
    out = np.asarray(function(jnp.ones((40, 50, 2, 3)), key=KEY)).reshape(2000, 6)
    assert ((out == 0).all(1) | (out != 0).all(1)).all()
    assert_rate(out[:, 0] != 0, 0.75)


@pytest.mark.parametrize("batched", [False, True], ids=["one-call", "vmap"])
def test_moments(batched):
    """Uniform, normal, exponential and Poisson numbers have the mean and variance they should."""
    function = torchleaf.torch_function(
        lambda x: (torch.rand_like(x), torch.randn_like(x), torch.empty_like(x).exponential_(), torch.poisson(4 + x))
    )
    if batched:
        keys = jax.random.split(KEY, 400)
        out = jax.vmap(lambda x, key: function(x, key=key))(jnp.zeros((400, 100)), keys)
    else:
        out = function(jnp.zeros(40_000), key=KEY)
    moments = [(0.5, 1 / 12), (0.0, 1.0), (1.0, 1.0), (4.0, 4.0)]
    for values, (mean, variance) in zip(out, moments, strict=True):
        assert abs(values.mean() - mean) < 5 * np.sqrt(variance / values.size)
        assert abs(values.var() - variance) < 0.05 * variance


# --- keys --------------------------------------------------------------------------------------------

KEYS = {
    "typed": lambda: jax.random.key(7),
    "raw": lambda: jax.random.PRNGKey(7),
    "numpy": lambda: np.asarray(jax.random.PRNGKey(7)),
    "rbg": lambda: jax.random.key(7, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(7, impl="unsafe_rbg"),
    "raw-rbg": lambda: jax.random.key_data(jax.random.key(7, impl="rbg")),
}


@each(KEYS)
def test_kinds_of_keys(sampler, x):
    function, key = SAMPLERS["dropout"](), sampler()
    drawn = function(x, key=key)
    assert_equal(jax.jit(function)(x, key=key), drawn)
    assert 0 < (drawn == 0).sum() < 24


def test_typed_and_raw_keys_are_one_key(x):
    function = SAMPLERS["dropout"]()
    first, *others = [function(x, key=KEYS[name]()) for name in ("typed", "raw", "numpy")]
    assert_equal(others, [first] * 2)
    assert_equal(function(x, key=KEYS["rbg"]()), function(x, key=KEYS["raw-rbg"]()))


def test_every_word_of_a_key_counts(x):
    """Keys that differ in one bit of any word."""
    function = SAMPLERS["randn"]()
    words = [np.array(w, np.uint32) for w in ([0, 0], [1, 0], [0, 1], [2**31, 0], [0, 2**31], [1, 1])]
    assert len({np.asarray(function(x, key=w)).tobytes() for w in words}) == len(words)


GARBAGE = {
    "int": (0, "got int"),
    "string": ("key", "got str"),
    "floats": (np.ones(2, np.float32), r"got float32\[2\]"),
    "signed": (np.ones(2, np.int32), r"got int32\[2\]"),
    "scalar": (np.uint32(1), r"got uint32\[\]"),
    "three-words": (np.ones(3, np.uint32), r"got uint32\[3\]"),
    "no-words": (np.ones((2, 0), np.uint32), r"got uint32\[2, 0\]"),
}


@pytest.mark.parametrize(("key", "given"), GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("name", ["dropout", "sin"])
def test_what_is_no_key_is_refused(key, given, name, x):
    """Whether or not the function draws."""
    function = SAMPLERS["dropout"]() if name == "dropout" else torchleaf.torch_function(torch.sin)
    with pytest.raises(TypeError, match=rf"{name}.*key must be a JAX PRNG key.*{given}"):
        function(x, key=key)


@pytest.mark.parametrize("keys", [jax.random.split(KEY, 3), jax.random.key_data(jax.random.split(KEY, 3))])
def test_arrays_of_keys_are_refused(keys, x):
    with pytest.raises(TypeError, match=r"array of keys of shape \(3,\).*jax.vmap over the keys"):
        SAMPLERS["dropout"]()(x, key=keys)


def test_functions_that_draw_nothing_take_a_key_too(x):
    """So that a model may pass one to each of its layers."""
    function = torchleaf.torch_function(torch.sin)
    assert_equal(function(x, key=KEY), function(x))
    assert_equal(jax.vmap(lambda key: function(x, key=key))(jax.random.split(KEY, 2)), jnp.stack([function(x)] * 2))


def test_a_parameter_named_key(x):
    """What is no typed PRNG key belongs to the function, unless its `key` is given already."""
    scaled = torchleaf.torch_function(lambda x, key: x * key)
    assert_equal(scaled(x, key=2 * x), 2 * x * x)
    dropped = torchleaf.torch_function(lambda x, key: F.dropout(x) + key)
    assert_equal(dropped(x, jnp.zeros(24), key=KEY), SAMPLERS["dropout"]()(x, key=KEY))
    assert_equal(dropped(x, jnp.zeros(24), key=jax.random.PRNGKey(0)), SAMPLERS["dropout"]()(x, key=KEY))
    with pytest.raises(TypeError, match="missing a required argument: 'key'"):
        dropped(x, key=KEY)


# --- without a key -----------------------------------------------------------------------------------


@each(SAMPLERS)
def test_drawing_without_a_key_is_an_error(sampler, x):
    """Of the trace, which names the op."""
    with pytest.raises(torchleaf.RandomnessError, match=r"draws random numbers \(aten\.\w+.*Pass `key=`"):
        jax.jit(sampler())(x)


NOT_RANDOM = {
    "evaluation": lambda x: F.dropout(x, 0.5, training=False) + F.rrelu(-x, training=False),
    "rate-zero": lambda x: F.dropout(x, 0.0) + F.alpha_dropout(x, 0.0, training=True),
    "inference-mode": torch.inference_mode()(lambda x: F.dropout(x, 0.0).clone()),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 4, 6)] * 3),
}


@each(NOT_RANDOM)
def test_what_draws_nothing_needs_no_key(sampler, x):
    function, state = torchleaf.torch_function(sampler), torch.get_rng_state()
    assert_equal(jax.jit(function)(x), function(x, key=KEY))
    assert torch.get_rng_state().equal(state)


def test_probability_zero_draws_all_the_same(x):
    """torch's generator moves, so this is a draw: only a dropout rate of zero is none."""
    never = torchleaf.torch_function(lambda x: torch.bernoulli(x, p=0.0))
    with pytest.raises(torchleaf.RandomnessError, match="bernoulli"):
        never(x)
    assert_equal(never(x, key=KEY), jnp.zeros(24))


@pytest.mark.long
def test_a_draw_that_depends_on_values(x):
    """Code that cannot be traced: the key is there when it is needed, its lack an error of the running program."""

    def function(x):
        return F.dropout(x) if x.sum() > 0 else x.clone()

    ours = torchleaf.torch_function(function, out_shape=jax.ShapeDtypeStruct((24,), jnp.float32))
    assert_equal(jax.jit(ours)(x, key=KEY), SAMPLERS["dropout"]()(x, key=KEY))
    assert_equal(jax.jit(ours)(-x), -x)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="draws random numbers"):
        jax.block_until_ready(jax.jit(ours)(x))
