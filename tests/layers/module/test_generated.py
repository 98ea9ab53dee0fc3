"""Random modules give in JAX what they give in torch, and nothing that goes in is ever written to.

A test's id is the seed: `print(generate(seed))` of `generated_modules.py` shows the module, as a failing test does.
"""

import copy
from dataclasses import dataclass
from functools import cached_property

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from generated_layers import WEIGHT_WRITES, WRITES, Buffers, Noise, names_of_parts, quieted, random_parts
from generated_modules import Generated, generate
from module_reference import snapshot, torch_gradients_of, weighted_sum
from samples import raw_bytes
from torch import nn
from untouched import unchanged

FAST, SLOW, STEPS = 20, 500, 3
SEEDS = [*range(FAST), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FAST, FAST + SLOW))]

pytestmark = [pytest.mark.both_engines(every=4), pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")]


@dataclass
class Case:
    """A generated module, what it is called on, and what torch makes of it."""

    generated: Generated

    @cached_property
    def quiet(self) -> nn.Module:
        """The module with randomness switched off."""
        return quieted(self.generated.module)

    @cached_property
    def wrapped(self) -> tuple[torchleaf.TorchModule, eqx.nn.State]:
        """That module in JAX, traced once for all tests."""
        return wrap(self.quiet)

    @cached_property
    def inputs(self) -> torch.Tensor:
        """A batch for each of several steps."""
        return self.generated.inputs(STEPS)

    def keys(self, n: int) -> jax.Array:
        """`n` keys, the same ones each time."""
        return jax.random.split(jax.random.key(self.generated.seed), n)

    @cached_property
    def has_state(self) -> bool:
        """Whether a call changes buffers."""
        module = copy.deepcopy(self.quiet)
        before = {name: (id(b), b._version) for name, b in module.named_buffers()}
        with torch.no_grad():
            module(self.inputs[0].clone())
        return before != {name: (id(b), b._version) for name, b in module.named_buffers()}


@pytest.fixture(scope="module", params=SEEDS)
def built(request):
    """One case for all tests of a seed, which run one after another."""
    return Case(generate(request.param))


@pytest.fixture
def case(built, engine):
    """A case, shown where a test fails; torch's modules and inputs must afterwards be as they were, bit for bit."""
    print(built.generated)
    if engine == "xla" and any(getattr(part, "momentum", 0) is None for part in built.generated.module.modules()):
        pytest.skip("a cumulative average reads how many batches there were")

    def state():
        return snapshot(built.generated.module), snapshot(built.quiet), raw_bytes(built.inputs)

    before, generators = state(), torch.get_rng_state()
    yield built
    assert state() == before
    assert torch.equal(torch.get_rng_state(), generators)


def wrap(module, **options):
    return eqx.nn.make_with_state(torchleaf.TorchModule)(module, **options)


def call(model, state, x, key=None):
    return model(x, state=state, key=key)


def again(state):
    """A state from which a call was made already, for another call: Equinox asks for it."""
    return jax.tree.map(lambda x: x, state)


def buffers(model, state):
    return from_torch(dict(torchleaf.to_torch_module(model, state).named_buffers()))


# --- what is computed ----------------------------------------------------------------------------


def test_steps_eager_jitted_and_scanned(case, engine):
    """The same kernels run on the same bits; of recurrent layers torch has two, chosen by whether gradients are on."""
    rounding = 1e-6 if any(isinstance(part, nn.RNNBase) for part in case.quiet.modules()) else 0
    rounding = rounding if engine == "torch" else 1e-5
    model, initial = case.wrapped
    xs = from_torch(case.inputs)
    outputs, final = torch_steps(case.quiet, case.inputs)

    def scan(model, state, xs):
        return jax.lax.scan(lambda state, x: call(model, state, x)[::-1], state, xs)

    with unchanged(model, initial, xs):
        for jit in (lambda f: f, eqx.filter_jit):
            state, step = again(initial), jit(call)
            for x, expected in zip(xs, outputs, strict=True):
                y, state = step(model, state, x)
                assert_trees_close(y, expected, rtol=rounding, atol=rounding)
            assert_trees_close(buffers(model, state), final, rtol=rounding, atol=rounding)
        state, ys = eqx.filter_jit(scan)(model, again(initial), xs)
        assert_trees_close(ys, outputs, rtol=rounding, atol=rounding)
        assert_trees_close(buffers(model, state), final, rtol=rounding, atol=rounding)


@pytest.mark.long
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients(case, residuals):
    """Of parameters and inputs, with the new state on the side."""
    model, state = case.wrapped if residuals == "live" else wrap(case.quiet, residuals=residuals)
    x = from_torch(case.inputs[0])

    def loss(differentiated, state):
        model, x = differentiated
        y, state = call(model, state, x)
        return weighted_sum(y), state

    with unchanged(model, state, x):
        grads, new_state = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((model, x), again(state))
    assert_gradients(grads, case.quiet, case.inputs[0])
    _, expected = torch_steps(case.quiet, case.inputs[:1])
    assert_trees_close(buffers(model, new_state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_vmap(case):
    """Over inputs, or over models and their states; gradients of parameters that the batch shares are summed."""
    (over_models if case.has_state else over_inputs)(case)


def over_inputs(case):
    model, xs = torchleaf.TorchModule(case.quiet), from_torch(case.inputs)

    def loss(differentiated):
        model, xs = differentiated
        ys = jax.vmap(model)(xs)
        return weighted_sum(ys), ys

    with unchanged(model, xs):
        grads, ys = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((model, xs))
    outputs, _ = torch_steps(case.quiet, case.inputs)
    assert_trees_close(ys, outputs, rtol=1e-4, atol=1e-5)
    assert_gradients(grads, case.quiet, case.inputs, loop)


def over_models(case):
    model, state = case.wrapped
    xs = from_torch(case.inputs)
    with pytest.raises(torchleaf.StateError, match="vmap"):
        jax.vmap(lambda x: call(model, again(state), x))(xs)
    modules = [rescaled(case.quiet, 1 - 0.1 * i) for i in range(STEPS)]
    models, states = map(torchleaf.stack, zip(*map(wrap, modules), strict=True))

    def loss(differentiated, states):
        models, xs = differentiated
        ys, states = eqx.filter_vmap(call)(models, states, xs)
        return sum(map(weighted_sum, ys)), (ys, states)

    with unchanged(models, states, xs):
        grads, (ys, states) = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((models, xs), again(states))
    for i, module in enumerate(modules):
        outputs, after = torch_steps(module, case.inputs[i : i + 1])
        y, model, state, *row = row_of((ys, models, states, *grads), i)
        assert_trees_close(y, outputs[0], rtol=1e-4, atol=1e-5)
        assert_trees_close(buffers(model, state), after, rtol=1e-4, atol=1e-5)
        assert_gradients(row, module, case.inputs[i])


def row_of(tree, i):
    """One of a stack; by NumPy, for which nothing has to be compiled."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[i]) if eqx.is_array(a) else a, tree)


@pytest.mark.slow
def test_the_seeds_cover_the_grammar():
    """Every write, kind of buffer and kind of noise occurs, and what users combine them with."""
    modules = [generate(seed).module for seed in range(FAST + SLOW)]
    names = set[str]().union(*map(names_of_parts, modules))
    kinds = {*WRITES, *WEIGHT_WRITES, *Buffers.KINDS, *Noise.KINDS}
    layers = {"BatchNorm1d", "BatchNorm2d", "Conv1d", "Conv2d", "Embedding", "GRU", "LSTM", "SelfAttention", "Tied"}
    assert names >= kinds | layers
    parameters = [list(module.parameters()) for module in modules]
    assert any(all(not p.requires_grad for p in ps) for ps in parameters if ps)
    places = [list(module.named_parameters(remove_duplicate=False)) for module in modules]
    assert any(len(ps) < len(all_places) for ps, all_places in zip(parameters, places, strict=True))
    assert {module.training for module in modules} == {True, False}


# --- randomness ----------------------------------------------------------------------------------


@pytest.mark.long
def test_key(case):
    """It decides every random number, whichever way the call runs; the backward pass has the forward's numbers."""
    (with_key if random_parts(case.generated.module) else without_use_of_the_key)(case)


def without_use_of_the_key(case):
    model, state = case.wrapped
    x = from_torch(case.inputs[0])
    assert_trees_close(*(call(model, again(state), x, key) for key in (jax.random.key(0), None)), rtol=0, atol=0)


def with_key(case):
    module, x, keys = case.generated.module, from_torch(case.inputs[0]), case.keys(6)
    model, state = wrap(module)
    recomputing, initial = wrap(module, residuals="recompute")
    with unchanged(model, state, x, jax.random.key_data(keys)):
        with pytest.raises(torchleaf.RandomnessError, match="key"):
            call(model, again(state), x)
        eager = [call(model, again(state), x, key)[0] for key in keys]
        results = [
            values_and_grads(function)((*given, x), keys[0])
            for function, *given in ((call, model, state), (call, recomputing, initial), (checkpointed, model, state))
        ]
    for (_, y), grads in results:
        assert_trees_close(y, eager[0])
        assert_trees_close(jax.tree.leaves(grads), jax.tree.leaves(results[0][1]), rtol=1e-4, atol=1e-5)
    assert len({raw_bytes(y) for y in eager}) > 1 or not varies(module, case.inputs[0])
    if not case.has_state:
        with_a_key_for_each_example(case)


def with_a_key_for_each_example(case):
    """Each has its own random numbers: those it has alone."""
    model, xs, keys = torchleaf.TorchModule(case.generated.module), from_torch(case.inputs), case.keys(STEPS)

    def batch(model, _, xs, keys):
        return jax.vmap(lambda x, key: model(x, key=key))(xs, keys), None

    def one_by_one(model, _, xs, keys):
        return jnp.stack([model(x, key=keys[i]) for i, x in enumerate(xs)]), None

    with unchanged(model, xs):
        results = [values_and_grads(function)((model, None, xs), keys) for function in (batch, one_by_one)]
    ((_, ys), grads), ((_, expected), expected_grads) = results
    assert_trees_close(ys, expected, rtol=1e-4, atol=1e-5)
    assert_trees_close(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), rtol=1e-4, atol=1e-4)


def checkpointed(model, state, x, key):
    return eqx.filter_checkpoint(call)(model, state, x, key)


def values_and_grads(function):
    """Compiled: output and gradients of (model, state, x), given the key."""

    def loss(differentiated, key):
        y, _ = function(*differentiated, key)
        return weighted_sum(y), y

    return eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))


# --- in torch ------------------------------------------------------------------------------------


def torch_steps(module, xs):
    """Outputs of successive calls in torch, and the buffers after them; what a call does to parameters ends with it."""
    twin, outputs = copy.deepcopy(module).requires_grad_(False), []  # torch chooses kernels by `requires_grad`
    for x in xs:
        for p, original in zip(twin.parameters(), module.parameters(), strict=True):
            p.copy_(original.detach())
        outputs.append(twin(x.clone()).clone())
    return from_torch(torch.stack(outputs)), from_torch(dict(twin.named_buffers()))


def loop(module):
    """Over a batch of batches; a write into a parameter is seen by the call that makes it alone."""

    def looped(xs):
        params = dict(module.named_parameters())
        calls = ({n: p.clone() for n, p in params.items()} for _ in xs)
        return torch.stack([torch.func.functional_call(module, w, x.clone()) for w, x in zip(calls, xs, strict=True)])

    return looped


def varies(module, x):
    """Whether the random numbers of several runs show in the output."""
    with torch.random.fork_rng(devices=[]):
        return len({raw_bytes(copy.deepcopy(module)(x.clone())) for _ in range(6)}) > 1


def rescaled(module, factor):
    """A copy with other weights."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(factor)
    return twin


def assert_gradients(grads, module, x, function=lambda module: module):
    """`grads` are those of (model, inputs); ids have none."""
    model_grads, grad_of_x = grads
    twin = copy.deepcopy(module)
    expected, expected_of_x = torch_gradients_of(function(twin), twin, (x,), {})
    assert_trees_close(model_grads.params, expected, rtol=1e-4, atol=1e-4)
    assert_trees_close([] if grad_of_x is None else [grad_of_x], expected_of_x, rtol=1e-4, atol=1e-4)
