"""Live residuals on a GPU: torch's graph stays from the forward call to the backward call, and nothing waits for it."""

import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from on_gpu import numbers, on_gpu, synchronising_is_an_error
from torch import nn
from torchleaf import TorchModule, to_torch, torch_function, trainable
from torchleaf.interop.calls import residuals
from torchleaf.interop.calls.residuals import live_graphs

pytestmark = pytest.mark.gpu


@pytest.fixture
def uses(monkeypatch):
    """How many backward calls found a graph or a recording."""
    uses = []
    take = residuals.Store.take
    monkeypatch.setattr(residuals.Store, "take", lambda self, number: (uses.append(number), take(self, number))[1])
    return uses


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradients_are_torchs(jit, replay, uses):
    module = network().cuda().eval()
    model, x = TorchModule(module, replay=replay), on_gpu(numbers(4, 3, 6, 6))
    gradient = eqx.filter_grad(lambda model, x: jnp.sum(model(x) ** 2))
    gradient = eqx.filter_jit(gradient) if jit else gradient
    before = live_graphs()
    for run in range(6):
        grads = gradient(model, x + run)
        module.zero_grad()
        (module(to_torch(x + run)) ** 2).sum().backward()
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(grads.params[name], parameter.grad.cpu(), rtol=2e-3, atol=2e-3)
    assert len(uses) == 6
    del grads
    gc.collect()
    assert live_graphs() == before


def test_a_layer_used_three_times_and_twice_in_flight(uses):
    fn = torch_function(lambda w, x: torch.tanh(x @ w))
    w, x = on_gpu(numbers(32, 32) / 6), on_gpu(numbers(5, 32))

    def loss(f, w):
        return jnp.sum(f(w, f(w, f(w, x))) ** 2) + jnp.sum(f(2 * w, x))

    gradient = jax.jit(jax.grad(lambda w: loss(fn, w)))
    expected = jax.jit(jax.grad(lambda w: loss(lambda w, x: jnp.tanh(x @ w), w)))
    for run in range(8):
        np.testing.assert_allclose(gradient(w + 0.01 * run), expected(w + 0.01 * run), rtol=1e-3, atol=1e-4)
    assert len(uses) == 8 * 4


def test_loops_and_branches_run_the_forward_again(uses):
    fn = torch_function(lambda w, x: torch.tanh(x @ w))
    w, x = on_gpu(numbers(8, 8) / 3), on_gpu(numbers(5, 8))

    def twin(w, x):
        return jnp.tanh(x @ w)

    def scanned(f, w):
        return jnp.sum(jax.lax.scan(lambda x, _: (f(w, x), None), x, None, length=20)[0] ** 2)

    def branched(f, w):
        return jnp.sum(jax.lax.cond(w[0, 0] > 0, lambda x: f(w, x), lambda x: 2 * x, x) ** 2)

    for loss in (scanned, branched):
        gradient, expected = (jax.jit(jax.grad(lambda w, f=f: loss(f, w))) for f in (fn, twin))
        for run in range(4):
            np.testing.assert_allclose(gradient(w + 0.01 * run), expected(w + 0.01 * run), rtol=1e-3, atol=1e-4)
    assert not uses


def test_training_does_not_synchronise_and_keeps_memory_flat(uses):
    """A whole step, with an optimizer of JAX's, dropout by keys and batch statistics as state."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4)).cuda()
    model, state = eqx.nn.make_with_state(TorchModule)(module)
    optimizer = optax.adam(1e-3)
    params, static = eqx.partition(model, trainable(model))
    opt_state = optimizer.init(params)
    x, y = on_gpu(numbers(32, 16)), on_gpu(numbers(32, 4, seed=1))

    @jax.jit
    def step(params, state, opt_state, key):
        key, now = jax.random.split(key)

        def loss(params):
            out, new = eqx.combine(params, static)(x, state=state, key=now)
            return jnp.mean((out - y) ** 2), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, key, value

    key, losses = on_gpu(jax.random.key(0)), []
    for _ in range(20):  # recordings, proofs, captures
        params, state, opt_state, key, value = step(params, state, opt_state, key)
        losses.append(value)
    jax.block_until_ready(params)
    before = torch.cuda.memory_allocated(), jax.devices()[0].memory_stats()["bytes_in_use"], live_graphs()
    with synchronising_is_an_error():
        for i in range(1000):
            params, state, opt_state, key, value = step(params, state, opt_state, key)
            if i % 100 == 0:
                losses.append(value)
        jax.block_until_ready(params)
    after = torch.cuda.memory_allocated(), jax.devices()[0].memory_stats()["bytes_in_use"], live_graphs()
    assert after[0] <= before[0] + 2**20
    assert after[1] <= before[1] + 2**20
    assert after[2] == before[2]
    assert len(uses) == 1020
    assert float(losses[-1]) < 0.6 * float(losses[0])


def test_eager_gradients_do_not_synchronise():
    fn = torch_function(lambda w, x: torch.tanh(x @ w))
    w, x = on_gpu(numbers(8, 8)), on_gpu(numbers(5, 8))
    gradient = jax.grad(lambda w: jnp.sum(fn(w, x) ** 2))
    expected = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
    jax.block_until_ready(gradient(w))
    with synchronising_is_an_error():
        found = [gradient(w) for _ in range(3)]
    for f in found:
        np.testing.assert_allclose(f, expected, rtol=1e-3, atol=1e-4)


def test_per_example_gradients():
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()
    model, xs = TorchModule(module), on_gpu(numbers(7, 6))
    gradient = eqx.filter_jit(jax.vmap(lambda x: eqx.filter_grad(lambda m: m(x)[0] ** 2)(model).params["0.weight"]))
    for run in range(4):
        found = gradient(xs + run)
        for i, x in enumerate(to_torch(xs + run)):
            (expected,) = torch.autograd.grad(module(x)[0] ** 2, module[0].weight)
            np.testing.assert_allclose(found[i], expected.cpu(), rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_a_cotangent_is_no_tensor_left_behind():
    """The thread on which torch goes backward holds what it returned for a moment after it has returned."""
    fn = torch_function(lambda w, x: (w + x, w * x), residuals="recompute", replay=False)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(fn(w, x)[0]) + fn(w, x)[1])))
    w, x = on_gpu(numbers(64)), on_gpu(numbers(64, seed=1))
    expected = np.cos(np.asarray(w) + np.asarray(x)) + np.asarray(x)
    for _ in range(300):
        np.testing.assert_allclose(gradient(w, x), expected, rtol=1e-3, atol=1e-5)
