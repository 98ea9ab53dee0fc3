"""Buffers that a forward changes come out as new state, step by step what torch's own become; nothing else changes."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import ResNet18
from module_reference import snapshot, torch_gradients_of
from samples import raw_bytes
from stateful_layers import (
    STATEFUL,
    UPDATES,
    Counters,
    CountsPositive,
    MovingAverage,
    assert_as_torch,
    assert_equal,
    buffers_of,
    by_torch,
    each,
    loss_and_state,
    make,
    some,
)
from torch import nn
from torchleaf.interop.transport.program import wait_until_idle

pytestmark = pytest.mark.both_engines(every=4)
STEPS = 4


# --- steps -------------------------------------------------------------------------------------------


def loop(model, state, xs, call=lambda model, x, state: model(x, state=state)):
    outputs = []
    for x in xs:
        y, state = call(model, x, state)
        outputs.append(y)
    return outputs, state


def compiled_loop(model, state, xs):
    return loop(model, state, xs, eqx.filter_jit(lambda model, x, state: model(x, state)))


def scan(model, state, xs):
    def step(state, x):
        y, state = model(x, state)
        return state, y

    state, outputs = jax.lax.scan(step, state, jnp.stack(xs))
    return [jax.tree.map(lambda y, i=i: y[i], outputs) for i in range(len(xs))], state


@pytest.mark.usefixtures("readable")
@each
@pytest.mark.parametrize("run", [loop, compiled_loop, scan])
def test_steps_are_torchs_bit_for_bit(spec, run, engine):
    module, inputs = spec.make(), spec.inputs(STEPS)
    expected, buffers = by_torch(module, inputs)
    model, state = make(module)
    outputs, state = run(model, state, from_torch(inputs))
    assert_as_torch(engine, outputs, expected)
    assert_as_torch(engine, state.get(model.buffer_index), buffers)


@pytest.mark.usefixtures("readable")
@pytest.mark.long
@each
def test_nothing_else_changes(spec):
    """Neither the wrapped module nor any array JAX had before, through forward, backward and compiled steps."""
    module, inputs = spec.make(), from_torch(spec.inputs(2))
    model, state = make(module)
    arrays = [a for a in jax.tree.leaves((model, state, inputs)) if eqx.is_array(a)]
    before = snapshot(module), [raw_bytes(a) for a in arrays]
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss_and_state, has_aux=True))
    for x in inputs:
        (_, state), _ = step(model, x, state)
        _, state = model(x, state)
    jax.block_until_ready(state)
    assert (snapshot(module), [raw_bytes(a) for a in arrays]) == before


@pytest.mark.usefixtures("readable")
@each
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_and_state_of_one_step(spec, residuals, engine):
    """The state comes out of the differentiated call as of the plain one."""
    module, (x,) = spec.make(), spec.inputs(1)
    _, buffers = by_torch(module, [x])
    expected, (x_grad,) = torch_gradients_of(twin := copy.deepcopy(module), twin, (x,), {})
    model, state = make(module, residuals=residuals)
    params, static = eqx.partition(model, torchleaf.trainable(model))

    def loss(params, x, state):
        return loss_and_state(eqx.combine(params, static), x, state)

    (_, state), (grads, input_grad) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, from_torch(x), state
    )
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-4)
    assert_trees_close(input_grad, x_grad, rtol=1e-4, atol=1e-4)
    assert_as_torch(engine, state.get(model.buffer_index), buffers)


def test_no_gradient_flows_through_state():
    """A later output does not depend on an earlier input, as with torch's no_grad updates."""
    model, state = make(MovingAverage(3, UPDATES["in-place"]))

    def loss(first, state):
        _, state = model(first, state)
        y, _ = model(jnp.ones((2, 3)), state)
        return y.sum()

    gradient, of_state = jax.grad(loss, (0, 1), allow_int=True)(jnp.ones((2, 3)), state)
    assert_equal([gradient, *jax.tree.leaves(of_state)], [jnp.zeros((2, 3)), jnp.zeros(3)])


@pytest.mark.usefixtures("each_remat")
def test_checkpointed_steps(rng, engine):
    """jax.checkpoint runs the forward twice; the state is that of once."""
    module = nn.BatchNorm1d(3)
    model, state = make(module)
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    _, buffers = by_torch(module, [torch.tensor(x.tolist())])
    loss = jax.checkpoint(lambda x, state: loss_and_state(model, x, state))
    (_, state), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, state)
    assert_as_torch(engine, state.get(model.buffer_index), buffers)


# --- where a stateful module stands ------------------------------------------------------------------


class Net(eqx.Module):
    first: torchleaf.TorchModule
    second: torchleaf.TorchModule

    def __call__(self, x, state):
        x, state = self.first(jnp.sin(x), state=state)
        return self.second(x, state)


def in_a_user_module(a, b):
    return eqx.nn.make_with_state(lambda: Net(torchleaf.TorchModule(a), torchleaf.TorchModule(b)))()


def in_sequential(a, b):
    def layers():
        stateless = torchleaf.TorchModule(nn.Hardtanh(-9, 9))
        return [eqx.nn.Lambda(jnp.sin), torchleaf.TorchModule(a), stateless, torchleaf.TorchModule(b)]

    return eqx.nn.make_with_state(lambda: eqx.nn.Sequential(layers()))()


def by_hand(a, b):
    net = Net(torchleaf.TorchModule(a), torchleaf.TorchModule(b))
    return eqx.nn.delete_init_state(net), eqx.nn.State(net)


@pytest.mark.parametrize("place", [in_a_user_module, in_sequential, by_hand])
def test_inside_other_models(place):
    """Two stateful modules with buffers of the same names, each keeping its own."""
    a, b = nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    inputs = [torch.randn(6, 3) for _ in range(STEPS)]
    twin_a, twin_b = copy.deepcopy((a, b))
    expected = [from_torch(twin_b(twin_a(torch.sin(x)))) for x in inputs]
    model, state = place(a, b)
    step = eqx.filter_jit(lambda model, x, state: model(x, state))
    outputs, state = loop(model, state, from_torch(inputs), step)
    assert_trees_close(outputs, expected)
    modules = [model.first, model.second] if isinstance(model, Net) else [model[1], model[3]]
    for module, twin in zip(modules, (twin_a, twin_b), strict=True):
        assert_trees_close(module.buffers_in(state), buffers_of(twin))


def test_next_to_equinox_state():
    """Beside Equinox's own stateful layers, in one State."""

    class Both(eqx.Module):
        torch: torchleaf.TorchModule
        equinox: eqx.nn.BatchNorm

        def __call__(self, x, state):
            y, state = self.torch(x, state=state)
            normalise = jax.vmap(self.equinox, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return normalise(y, state)

    module, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    model, state = eqx.nn.make_with_state(
        lambda: Both(torchleaf.TorchModule(module), eqx.nn.BatchNorm(3, "batch", mode="batch"))
    )()
    y, state = eqx.filter_jit(lambda m, x, s: m(x, s))(model, from_torch(x), state)
    assert_trees_close(y.mean(0), jnp.zeros(3), atol=1e-5)
    assert_trees_close(model.torch.buffers_in(state), by_torch(module, [x])[1])


def test_other_methods_change_state(engine):
    class Two(MovingAverage):
        def observe(self, x):
            return self.forward(x).mean()

    module, x = Two(3, UPDATES["reassigned"]), torch.randn(5, 3)
    model, state = make(module)
    _, state = eqx.filter_jit(lambda m, x, s: m.call("observe", x, state=s))(model, from_torch(x), state)
    assert_as_torch(engine, state.get(model.buffer_index), by_torch(module, [x])[1])


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.torch_engine
@pytest.mark.long
def test_a_hundred_steps_of_a_resnet_are_torchs_bit_for_bit():
    """Losses, weights and running statistics under SGD.

    Such a small ResNet amplifies a change of the last bit to everything within twenty steps, in torch too. So nothing
    may differ: the loss is torch's, and the rate a power of two, with which optax's update rounds as torch's does.
    """
    wait_until_idle()  # a proof that an earlier test left running switches oneDNN off, for all threads
    module, rate = ResNet18(width=2), 2.0**-6
    model, state = make(module, copy=True)
    optimizer, torch_optimizer = optax.sgd(rate), torch.optim.SGD(module.parameters(), lr=rate)
    opt_state = optimizer.init(eqx.filter(model, torchleaf.trainable(model)))
    cross_entropy = torchleaf.torch_function(nn.functional.cross_entropy)

    @eqx.filter_jit
    def step(model, state, opt_state, x, labels):
        params, static = eqx.partition(model, torchleaf.trainable(model))

        def loss(params):
            logits, new_state = eqx.combine(params, static)(x, state=state)
            return cross_entropy(logits, labels), new_state

        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), new_state, opt_state, value

    losses, torch_losses = [], []
    for _ in range(100):
        x, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
        model, state, opt_state, value = step(model, state, opt_state, from_torch(x), from_torch(labels))
        losses.append(value)
        torch_optimizer.zero_grad()
        expected = nn.functional.cross_entropy(module(x), labels)
        expected.backward()
        torch_optimizer.step()
        torch_losses.append(from_torch(expected))
    assert_equal(losses, torch_losses)
    assert_equal(model.params, {n: from_torch(p) for n, p in module.named_parameters()})
    assert_equal(state.get(model.buffer_index), buffers_of(module))
    assert state.get(model.buffer_index)["stem.1.num_batches_tracked"] == 100


# --- evaluation mode ---------------------------------------------------------------------------------


def test_inference_mode_uses_the_statistics_and_keeps_them(engine):
    """To evaluation and back; the state passes through."""
    module, inputs = STATEFUL["nested"].make(), STATEFUL["nested"].inputs(3)
    model, state = make(module)
    _, state = loop(model, state, from_torch(inputs))
    for x in inputs:
        module(x)
    before = jax.tree.map(jnp.copy, state.get(model.buffer_index))

    x = inputs[0]
    evaluating = eqx.nn.inference_mode(model)
    y, state = eqx.filter_jit(lambda m, x, s: m(x, s))(evaluating, from_torch(x), state)
    assert_trees_close(y, from_torch(copy.deepcopy(module).eval()(x)))
    assert_as_torch(engine, state.get(model.buffer_index), before)

    training = eqx.nn.inference_mode(evaluating, value=False)
    y, state = training(from_torch(x), state)
    assert_as_torch(engine, y, from_torch(module(x)))
    assert_as_torch(engine, state.get(model.buffer_index), buffers_of(module))


@pytest.mark.parametrize("stateful", [True, False])
def test_evaluation_mode_needs_no_state_where_the_model_holds_the_buffers(stateful):
    module, x = nn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    if stateful:
        model, state = make(module)
        with pytest.raises(torchleaf.StateError, match=r"the buffers are in the eqx.nn.State"):
            model(from_torch(x))
        y, _ = model(from_torch(x), state)
    else:
        y = torchleaf.TorchModule(module)(from_torch(x))
    assert_trees_close(y, from_torch(module(x)))


def test_vmap_in_evaluation_mode_shares_the_state():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model, state = make(module)
    xs = torch.randn(5, 2, 3)
    ys, after = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(from_torch(xs), state)
    assert_trees_close(ys, from_torch(torch.stack([module(x) for x in xs])))
    assert_equal(after.get(model.buffer_index), buffers_of(module))


# --- weights and state in torch's terms --------------------------------------------------------------


@some
def test_state_dicts_carry_the_state(spec, engine):
    """Out to torch, and back in, with the buffers of the state."""
    module, inputs = spec.make(), spec.inputs(3)
    model, state = make(module)
    _, state = loop(model, state, from_torch(inputs[:2]))
    for x in inputs[:2]:
        module(x)

    exported = torchleaf.state_dict(model, state)
    assert_as_torch(engine, from_torch(exported), from_torch(dict(module.state_dict())))
    plain = torchleaf.to_torch_module(model, state)
    assert plain.training
    assert_as_torch(engine, from_torch(plain(inputs[2])), from_torch(copy.deepcopy(module)(inputs[2])))

    other, other_state = make(spec.make())
    other, other_state = torchleaf.load_state_dict(other, exported, other_state)
    assert_as_torch(engine, other_state.get(other.buffer_index), state.get(model.buffer_index))
    y, _ = other(from_torch(inputs[2]), other_state)
    assert_as_torch(engine, y, from_torch(module(inputs[2])))


def test_serialisation(tmp_path):
    """Equinox's own, of model and state together."""
    spec = STATEFUL["nested"]
    model, state = make(module := spec.make())
    (x,) = from_torch(spec.inputs(1))
    _, state = model(x, state)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", (model, state))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", make(copy.deepcopy(module)))
    assert_equal(loaded[0](x, loaded[1])[0], model(x, state)[0])


# --- dtypes ------------------------------------------------------------------------------------------


def test_float64_state(x64, engine):
    module, inputs = Counters(3, wide=True), STATEFUL["Counters"].inputs(STEPS)
    expected, buffers = by_torch(module, inputs)
    assert {"float64", "int64", "uint8", "bool", "bfloat16", "int32"} == {str(b.dtype) for b in buffers.values()}
    model, state = make(module)
    outputs, state = compiled_loop(model, state, from_torch(inputs))
    assert_as_torch(engine, outputs, expected)
    assert_as_torch(engine, state.get(model.buffer_index), buffers)


def test_double_batchnorm(x64, engine):
    module, x = nn.BatchNorm1d(3).double(), torch.randn(5, 3).double()
    model, state = make(module)
    y, state = eqx.filter_jit(lambda m, x, s: m(x, s))(model, from_torch(x), state)
    expected, buffers = by_torch(module, [x])
    assert_as_torch(engine, [y, state.get(model.buffer_index)], [expected[0], buffers])


# --- state that depends on values --------------------------------------------------------------------


@pytest.mark.torch_engine  # values are read
def test_state_that_depends_on_values():
    """Code that cannot be traced: run once eagerly, or with `out_shape`, and then compiled."""
    module = CountsPositive(3)
    inputs = [s * torch.ones(4, 3) for s in (1, -1, 2, 3)]
    expected, buffers = by_torch(module, inputs)
    assert buffers["count"] == 3
    for run, options in (
        (loop, {}),
        (compiled_loop, {"out_shape": jax.ShapeDtypeStruct((4, 3), jnp.float32)}),
        (scan, {"out_shape": jax.ShapeDtypeStruct((4, 3), jnp.float32)}),
    ):
        model, state = make(module, **options)
        outputs, state = run(model, state, from_torch(inputs))
        assert_equal(outputs, expected)
        assert_equal(state.get(model.buffer_index), buffers)


@pytest.mark.torch_engine  # values are read
def test_state_that_depends_on_values_without_state():
    """Refused when it happens, and only then; the next call is not affected."""
    module, x = CountsPositive(3), jnp.ones((4, 3))
    model = torchleaf.TorchModule(module)
    for _ in range(2):
        assert_equal(model(-x), from_torch(module(-torch.ones(4, 3))))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"changes buffer `count`.*make_with_state"):
            jax.block_until_ready(model(x))
    assert module.count == 0


@pytest.mark.all_cases
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse", "reverse over forward"])
def test_second_derivatives_beside_state(order, jit):
    """Of a call with outputs that have no tangents: new values of buffers."""
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(torch.nn.BatchNorm1d(3))
    leaves, treedef = jax.tree.flatten(state)
    x = jnp.sin(jnp.arange(15.0)).reshape(5, 3)

    def loss(params):
        now = jax.tree.unflatten(treedef, leaves)
        return jnp.sum(jnp.sin(eqx.tree_at(lambda m: m.params, model, params)(x, state=now)[0]))

    def twin(params):
        y = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * params["weight"] + params["bias"]
        return jnp.sum(jnp.sin(y))

    def product(f):
        def dot(gradient):
            return sum(jnp.vdot(gradient[name], tangents[name]) for name in tangents)

        return {
            "forward over reverse": lambda p: jax.jvp(jax.grad(f), (p,), (tangents,))[1],
            "reverse over reverse": jax.grad(lambda p: dot(jax.grad(f)(p))),
            "reverse over forward": jax.grad(lambda p: jax.jvp(f, (p,), (tangents,))[1]),
        }[order]

    params = {"weight": jnp.array([1.0, 2.0, -1.0]), "bias": jnp.array([0.1, 0.2, 0.3])}
    tangents = jax.tree.map(jnp.cos, params)
    assert_trees_close(jit(product(loss))(params), product(twin)(params), rtol=1e-4, atol=1e-5)
