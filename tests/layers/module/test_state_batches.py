"""State under vmap: one for each member of an ensemble, one for a native batch, and none that examples would share."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import torch_gradients_of, weighted_sum
from stateful_layers import STATEFUL, assert_equal, buffers_of, by_torch, loss_and_state, make, some
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")  # power iterations and index_copy_
@some
def test_ensembles_have_state_each(spec):
    """Stacked models and states: each member's steps are its module's own."""
    modules = [spec.make() for _ in range(3)]
    inputs = spec.inputs(2)
    models, states = zip(*map(make, modules), strict=True)
    model, state = torchleaf.stack(models), torchleaf.stack(states)
    step = eqx.filter_jit(eqx.filter_vmap(lambda m, s, x: m(x, s), in_axes=(eqx.if_array(0), eqx.if_array(0), None)))
    for x in inputs:
        ys, state = step(model, state, from_torch(x))
    for i, module in enumerate(modules):
        outputs, buffers = by_torch(module, inputs)
        assert_trees_close(jax.tree.map(lambda y, i=i: y[i], ys), outputs[-1], rtol=1e-4, atol=1e-5)
        member = {name: b[i] for name, b in state.get(model.buffer_index).items()}
        assert_trees_close(member, buffers, rtol=1e-4, atol=1e-5)


def test_ensembles_train_with_inputs_of_their_own():
    """Gradients and state under vmap over models, states and inputs, against torch one by one."""
    modules = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    xs = torch.randn(3, 6, 3)
    models, states = zip(*map(make, modules), strict=True)

    @eqx.filter_jit
    @eqx.filter_vmap
    def step(model, state, x):
        return eqx.filter_value_and_grad(loss_and_state, has_aux=True)(model, x, state)

    (_, state), grads = step(torchleaf.stack(models), torchleaf.stack(states), from_torch(xs))
    for i, module in enumerate(modules):
        expected, _ = torch_gradients_of(module, module, (xs[i],), {})
        assert_trees_close({n: g[i] for n, g in grads.params.items()}, expected, rtol=1e-4, atol=1e-4)
        member = {name: b[i] for name, b in state.get(models[0].buffer_index).items()}
        assert_trees_close(member, buffers_of(module))


@some
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_state_shared_by_a_batch_is_refused(spec, jit, method, engine):
    """Batch statistics need the whole batch; the error says what to do."""
    if engine == "xla" and spec is STATEFUL["spectral_norm"]:
        pytest.skip("its new state does not depend on the examples")
    model, state = make(spec.make(), vmap_method=method)
    xs = jnp.ones((5, *spec.shape))
    with pytest.raises(
        torchleaf.StateError, match=r"share the state.*on the whole batch outside vmap.*torchleaf.stack"
    ):
        jit(lambda xs, state: jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(xs, state))(xs, state)


BATCHES = {
    "InstanceNorm2d": (STATEFUL["InstanceNorm2d"].make, (3, 5, 2)),
    "MovingAverage": (STATEFUL["MovingAverage-in-place"].make, (3,)),
    "spectral_norm": (STATEFUL["spectral_norm"].make, (3,)),
}


@pytest.mark.torch_engine  # of `vmap_method`
@pytest.mark.parametrize(("factory", "shape"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_native_batches_are_one_step(factory, shape, jit):
    """`vmap_method="batched"`: one call on the whole batch, and one state for all, as outside vmap."""
    module, xs = factory(), torch.randn(5, *shape)
    (expected,), buffers = by_torch(module, [xs])
    model, state = make(module, vmap_method="batched")

    def batch(params, xs, state):
        call = eqx.tree_at(lambda m: m.params, model, params)
        return jax.vmap(call, in_axes=(0, None), out_axes=(0, None))(xs, state)

    ys, after = jit(batch)(model.params, from_torch(xs), state)
    assert_trees_close(ys, expected)
    assert_equal(after.get(model.buffer_index), buffers)
    expected_grads, _ = torch_gradients_of(twin := copy.deepcopy(module), twin, (xs,), {})
    grads = jit(jax.grad(lambda *args: weighted_sum(batch(*args)[0])))(model.params, from_torch(xs), state)
    assert_trees_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm2d(3), (3, 4, 4))], ids=["1d", "2d"]
)
def test_batchnorm_of_single_examples_says_what_to_do(module, shape):
    """Written for one example, as usual in Equinox: torch's own words would not tell."""
    model, state = make(module)
    with pytest.raises(torchleaf.TorchCallError, match=r"(?s)expected \dD.*whole batch.*outside"):
        jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(jnp.ones((5, *shape)), state)
