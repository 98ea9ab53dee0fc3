"""Gradients of each example: from one graph of the batch, or by replay; and no graph left behind."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit
from torchleaf.interop.calls import per_example
from torchleaf.interop.calls.residuals import live_graphs
from watching import Recorder

B, IN, OUT = 5, 3, 7


def dense(w, b, x):
    return torch.tanh(torch.nn.functional.linear(x, w, b))


def dense_twin(w, b, x):
    return jnp.tanh(w @ x + b)


@pytest.fixture
def operands():
    return twins.normal((OUT, IN), (OUT,), (B, IN))


def gradients(layer, argnums=(0, 1, 2)):
    """A function that gives value and gradients for one example."""
    return jax.value_and_grad(lambda w, b, x: jnp.square(layer(w, b, x)).sum(), argnums)


@pytest.fixture(params=["live", "replay", "live and replay"])
def replay(request, monkeypatch):
    """The option; small calls are replayed in place of a graph, larger ones have a graph that is replayed."""
    if request.param == "live and replay":
        monkeypatch.setattr(per_example, "SMALL", 0)
    return request.param != "live"


IN_AXES = [(None, None, 0), (0, None, 0), (1, 0, None), (None, None, 1)]


@eager_and_jit
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("in_axes", IN_AXES, ids=str)
def test_gradients_of_each_example(operands, in_axes, method, replay, jit):
    layer = torchleaf.torch_function(dense, vmap_method=method, replay=replay)
    args = [
        x if axis is None or (x.ndim == 2 and x is operands[2]) else jnp.stack([x, 2 * x, -x, x + 1, x - 1], axis)
        for x, axis in zip(operands, in_axes, strict=True)
    ]
    if in_axes[2] == 1:
        args[2] = args[2].T
    elif in_axes[2] is None:
        args[2] = args[2][0]
    actual = jit(jax.vmap(gradients(layer), in_axes))(*args)
    assert_trees_close(actual, jax.vmap(gradients(dense_twin), in_axes)(*args), rtol=1e-4, atol=1e-5)
    assert live_graphs() == 0


def test_a_large_call_is_replayed_with_one_forward_for_the_batch(operands, monkeypatch):
    monkeypatch.setattr(per_example, "SMALL", 0)
    recorder = Recorder(dense)
    layer = torchleaf.torch_function(recorder)
    w, b, x = operands
    step = jax.jit(jax.vmap(gradients(layer), (None, None, 0)))
    computed = []
    for run in range(5):
        expected = jax.vmap(gradients(dense_twin), (None, None, 0))(w, b, x + run)
        assert_trees_close(step(w, b, x + run), expected, rtol=1e-4, atol=1e-5)
        computed.append(len(recorder.computed))
    assert computed[1:] == [computed[0] + 1] * 4  # the first run is followed by a proof
    assert live_graphs() == 0


def test_the_forward_runs_once(operands):
    recorder = Recorder(dense)
    layer = torchleaf.torch_function(recorder, replay=False)
    w, b, x = operands
    step = jax.jit(jax.vmap(gradients(layer), (None, None, 0)))
    jax.block_until_ready(step(w, b, x))  # with a proof
    recorder.computed.clear()
    jax.block_until_ready(step(w, b, x))
    assert len(recorder.computed) == 1


@eager_and_jit
def test_cotangents_without_a_batch(operands, replay, jit):
    """`sum` gives every example the same cotangent."""
    w, b, x = operands
    layer = torchleaf.torch_function(dense, replay=replay)
    actual = jit(jax.vmap(jax.grad(lambda w, x: layer(w, b, x).sum()), (None, 0)))(w, x)
    expected = jax.vmap(jax.grad(lambda w, x: dense_twin(w, b, x).sum()), (None, 0))(w, x)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@eager_and_jit
@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd, jax.hessian], ids=lambda t: t.__name__)
def test_batched_cotangents_recompute(operands, transform, replay, jit):
    """A Jacobian's graph serves one cotangent; the batch of them recomputes."""
    w, b, x = operands
    layer = torchleaf.torch_function(dense, replay=replay)
    actual = jit(jax.vmap(transform(lambda x: layer(w, b, x))))(x)
    expected = jax.vmap(transform(lambda x: dense_twin(w, b, x)))(x)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert live_graphs() == 0


@eager_and_jit
def test_nested_batches(operands, replay, jit):
    w, b, x = operands
    layer = torchleaf.torch_function(dense, replay=replay)
    twice = jnp.stack([x, 2 * x])

    def program(layer):
        return jax.vmap(jax.vmap(gradients(layer), (None, None, 0)), (None, None, 0))

    expected = program(dense_twin)(w, b, twice)
    assert_trees_close(jit(program(layer))(w, b, twice), expected, rtol=1e-4, atol=1e-5)
    assert live_graphs() == 0


@pytest.mark.long
def test_branches_that_no_example_takes_leave_few_graphs(operands):
    """vmap turns `cond` into a choice between both branches, so a handle can be lost; its graph is dropped later."""
    w, b, x = operands
    layer = torchleaf.torch_function(dense, replay=False)

    def loss(w, x, flag):
        return jax.lax.cond(flag, lambda: layer(w, b, x).sum(), lambda: w.sum() * x.sum())

    def twin(w, x, flag):
        return jax.lax.cond(flag, lambda: dense_twin(w, b, x).sum(), lambda: w.sum() * x.sum())

    step = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    for flags in (jnp.zeros(B, bool), jnp.arange(B) % 2 == 0, jnp.ones(B, bool)):
        for _ in range(100):
            grads = step(w, x, flags)
        assert_trees_close(grads, jax.vmap(jax.grad(twin), (None, 0, 0))(w, x, flags), rtol=1e-4, atol=1e-5)
        assert live_graphs() <= 100
