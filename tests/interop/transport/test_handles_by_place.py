"""Handles that stand for their place, as on a GPU, here in the CPU's memory.

Gradients are right: by graphs where handles go straight from the forward call to the backward call, and otherwise by
running the forward again.
"""

import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from torchleaf.interop.calls import handles, residuals
from torchleaf.interop.calls.residuals import live_graphs


@pytest.fixture(autouse=True)
def _by_place(monkeypatch):
    monkeypatch.setattr(handles, "BY_PLACE", {"cpu", "cuda"})
    monkeypatch.setattr("torchleaf.interop.transport.lowering.BY_PLACE", {"cpu", "cuda"})
    gc.collect()
    before = live_graphs()
    yield
    jax.clear_caches()
    gc.collect()
    assert live_graphs() <= before


@pytest.fixture
def counts(monkeypatch):
    """How many backward calls found a graph or a recording, and how many forward calls kept one."""
    counts = {"used": 0, "kept": 0}
    take, put = residuals.Store.take, residuals.Store.put

    def counted_take(self, number):
        counts["used"] += 1
        take(self, number)

    def counted_put(self, graph):
        counts["kept"] += 1
        return put(self, graph)

    monkeypatch.setattr(residuals.Store, "take", counted_take)
    monkeypatch.setattr(residuals.Store, "put", counted_put)
    return counts


class Layer:
    """A torch layer and the same in JAX, of a weight and an input."""

    def __init__(self):
        self.torch = torchleaf.torch_function(lambda w, x: torch.tanh(x @ w) * x.cos())

    @staticmethod
    def jax(w, x):
        return jnp.tanh(x @ w) * jnp.cos(x)


def once(layer, w, x):
    return jnp.sum(layer(w, x) ** 2)


def thrice(layer, w, x):
    return jnp.sum(layer(w, layer(w * 2, layer(w, x))) ** 2)


def jitted_parts(layer, w, x):
    part = jax.jit(layer)
    return jnp.sum(part(w, part(w, x)) ** 2)


def nested_jits(layer, w, x):
    return jnp.sum(jax.jit(lambda w, x: jax.jit(layer)(w, jnp.sin(x)))(w, x) ** 2)


def scanned(layer, w, x):
    return jnp.sum(jax.lax.scan(lambda x, _: (layer(w, x), None), x, None, length=4)[0] ** 2)


def scanned_once(layer, w, x):
    return jnp.sum(jax.lax.scan(lambda x, _: (layer(w, x), None), x, None, length=1)[0] ** 2)


def scanned_jit(layer, w, x):
    return jnp.sum(jax.lax.scan(lambda x, _: (jax.jit(layer)(w, x), None), x, None, length=4)[0] ** 2)


def branched(layer, w, x):
    return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda x: layer(w, x), lambda x: 2 * x, x) ** 2)


def rematerialised(layer, w, x):
    return jnp.sum(jax.checkpoint(lambda x: layer(w, layer(w, x)))(x) ** 2)


def batched(layer, w, x):
    return jnp.sum(jax.vmap(layer, (None, 0))(w, x[:, None]) ** 2)


STRAIGHT = {once: 1, thrice: 3, jitted_parts: 2, nested_jits: 1}
LOSSES = [*STRAIGHT, scanned, scanned_once, scanned_jit, branched, rematerialised, batched]


def named(loss):
    return loss.__name__


@pytest.fixture
def operands(rng):
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in ((4, 4), (3, 4))]


@pytest.mark.long
@pytest.mark.parametrize("loss", LOSSES, ids=named)
@pytest.mark.parametrize("transform", ["jit", "eager", "inner jit", "vjp of jit"])
def test_gradients(loss, transform, operands):
    layer = Layer()
    gradient = jax.grad(lambda w, x: loss(layer.torch, w, x), (0, 1))
    if transform == "jit":
        gradient = jax.jit(gradient)
    elif transform == "inner jit":
        gradient = jax.grad(jax.jit(lambda w, x: loss(layer.torch, w, x)), (0, 1))
    elif transform == "vjp of jit":

        def gradient(w, x):
            return jax.vjp(jax.jit(lambda w, x: loss(layer.torch, w, x)), w, x)[1](jnp.float32(1))

    expected = jax.grad(lambda w, x: loss(layer.jax, w, x), (0, 1))
    for run in range(5):
        given = [a + 0.1 * run for a in operands]
        for ours, right in zip(gradient(*given), expected(*given), strict=True):
            np.testing.assert_allclose(ours, right, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("loss", STRAIGHT, ids=named)
@pytest.mark.parametrize("replay", [False, True])
def test_straight_handles_find_their_graph(loss, replay, operands, counts):
    layer = Layer()
    layer.torch = torchleaf.torch_function(lambda w, x: torch.tanh(x @ w) * x.cos(), replay=replay)
    gradient = jax.jit(jax.grad(lambda w, x: loss(layer.torch, w, x)))
    for runs in range(1, 6):
        jax.block_until_ready(gradient(*operands))
        assert counts == {"used": runs * STRAIGHT[loss], "kept": runs * STRAIGHT[loss]}


@pytest.mark.parametrize("loss", [scanned, scanned_jit, branched], ids=named)
def test_handles_that_are_copied_keep_no_graph(loss, operands, counts):
    layer = Layer()
    gradient = jax.jit(jax.grad(lambda w, x: loss(layer.torch, w, x)))
    for _ in range(3):
        jax.block_until_ready(gradient(*operands))
    assert counts == {"used": 0, "kept": 0}


def test_training_in_a_loop_finds_its_graphs(operands, counts):
    layer = Layer()
    w, x = operands

    @jax.jit
    def train(w):
        def step(w, _):
            return w - 0.1 * jax.grad(lambda w: once(layer.torch, w, x))(w), None

        return jax.lax.scan(step, w, None, length=5)[0]

    expected = w
    for _ in range(5):
        expected = expected - 0.1 * jax.grad(lambda w: once(layer.jax, w, x))(expected)
    for runs in range(1, 4):
        np.testing.assert_allclose(train(w), expected, rtol=1e-4, atol=1e-5)
        assert counts == {"used": 5 * runs, "kept": 5 * runs}


def test_eager_handles_find_their_graph_as_long_as_they_live(operands, counts):
    layer = Layer()
    y, pullback = jax.vjp(layer.torch, *operands)
    _, other = jax.vjp(layer.torch, *operands)
    first, second, third = pullback(y), pullback(y), other(y)
    assert counts == {"used": 2, "kept": 2}  # the second has to run the forward again
    for a, b, c in zip(first, second, third, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    before = live_graphs()
    _, dropped = jax.vjp(layer.torch, *operands)
    assert live_graphs() == before + 1
    del dropped
    gc.collect()
    assert live_graphs() == before


def test_a_handle_that_was_copied_is_seen_in_the_first_runs(operands, monkeypatch):
    """Should XLA copy a handle although the program does not say so."""
    layer = Layer()
    monkeypatch.setattr("torchleaf.interop.transport.program.is_signed", lambda handle: False)
    gradient = jax.jit(jax.grad(lambda w, x: once(layer.torch, w, x)))
    expected = jax.grad(lambda w, x: once(layer.jax, w, x))
    for run in range(4):
        given = [a + 0.1 * run for a in operands]
        np.testing.assert_allclose(gradient(*given), expected(*given), rtol=2e-4, atol=2e-5)


@pytest.mark.long
def test_modules(rng):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    module.eval()
    model, x = torchleaf.TorchModule(module), jnp.asarray(rng.normal(size=(6, 5)).astype(np.float32))
    step = eqx.filter_jit(eqx.filter_grad(lambda model, x: jnp.sum(model(x) ** 2)))
    for run in range(4):
        grads = step(model, x + run)
        module.zero_grad()
        (module(torchleaf.to_torch(x + run)) ** 2).sum().backward()
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(grads.params[name], parameter.grad, rtol=1e-4, atol=1e-5)
