"""Replays as CUDA graphs: launched once addresses repeat, never while what they keep is in use."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_gpu import numbers, on_gpu
from torchleaf import TorchModule, to_torch, torch_function
from torchleaf.interop.replay import cuda_graphs

pytestmark = pytest.mark.gpu


@pytest.fixture
def launches(monkeypatch):
    """Launches of captured graphs."""
    launches = []
    launch = cuda_graphs._Graph.launch
    monkeypatch.setattr(cuda_graphs._Graph, "launch", lambda self, xs: (launches.append(self), launch(self, xs))[1])
    return launches


def layer(w, x):
    return torch.tanh(x @ w) * x.cos()


def twin(w, x):
    return jnp.tanh(x @ w) * jnp.cos(x)


def test_inference_is_launched(launches):
    fn, expected = jax.jit(torch_function(layer)), jax.jit(twin)
    w, x = on_gpu(numbers(16, 16)), on_gpu(numbers(4, 16))
    for run in range(10):
        np.testing.assert_allclose(fn(w, x * run), expected(w, x * run), rtol=1e-3, atol=1e-4)
    assert launches


def test_training_is_launched_forward_and_backward(launches):
    fn = torch_function(layer)

    def train(f):
        def step(w):
            return w - 0.1 * jax.grad(lambda w: jnp.mean(f(w, x) ** 2))(w)

        return jax.jit(step, donate_argnums=0)

    x = on_gpu(numbers(4, 16))
    ours, theirs = train(fn), train(twin)
    w, expected = on_gpu(numbers(16, 16)), on_gpu(numbers(16, 16))
    for _ in range(30):
        w, expected = ours(w), theirs(expected)
    np.testing.assert_allclose(w, expected, rtol=2e-3, atol=2e-4)
    assert len(launches) >= 40  # of 60 halves
    assert len(set(map(id, launches))) <= 2 * cuda_graphs._MOST_GRAPHS


def test_what_a_graph_keeps_is_not_overwritten_before_its_backward_half():
    """Two calls of one layer in one program, and forward calls whose backward half comes later, or never."""
    fn = torch_function(layer)
    w, x = on_gpu(numbers(16, 16)), on_gpu(numbers(4, 16))

    def loss(f, w):
        return jnp.sum(f(w, f(w, x)) ** 2) * jnp.sum(f(w, x + 1))

    gradient, expected = (jax.jit(jax.grad(lambda w, f=f: loss(f, w))) for f in (fn, twin))
    for run in range(10):
        np.testing.assert_allclose(gradient(w + 0.1 * run), expected(w + 0.1 * run), rtol=5e-3, atol=5e-3)
    forward = jax.jit(lambda w, x: jax.vjp(fn, w, x))
    in_flight = [forward(w + i, x) for i in range(6)]
    for i in reversed(range(0, 6, 2)):
        y, pullback = in_flight[i]
        for ours, right in zip(pullback(y), jax.vjp(twin, w + i, x)[1](y), strict=True):
            np.testing.assert_allclose(ours, right, rtol=2e-3, atol=2e-3)


def test_kept_memory_is_free_again_when_it_is_dropped():
    graph = cuda_graphs._Graph(torch.cuda.CUDAGraph(), [torch.zeros(1)], {}, 0)
    assert graph.take()
    kept = cuda_graphs._Kept([torch.zeros(1)], graph)
    assert not graph.take()
    del kept
    assert graph.take()


def test_what_cannot_be_captured_runs_op_by_op():
    """An op that waits for the device: torch checks a matrix while it factorises it."""
    fn = jax.jit(torch_function(lambda a: torch.linalg.cholesky(a) * 2))
    a = np.eye(4, dtype=np.float32) * 4
    for run in range(6):
        np.testing.assert_allclose(
            fn(on_gpu(a + run * np.eye(4, dtype=np.float32))), 2 * np.sqrt(4 + run) * np.eye(4), rtol=1e-5
        )
    other = jax.jit(torch_function(lambda x: x * 2 + 1))
    for _ in range(6):
        np.testing.assert_allclose(other(on_gpu(a)), 2 * a + 1)


def test_captured_constants_that_change_are_read_anew():
    scale = torch.ones(3, device="cuda")
    fn = jax.jit(torch_function(lambda x: x * scale))
    x = on_gpu(numbers(3))
    for run in range(8):
        scale.fill_(run)
        np.testing.assert_allclose(fn(x), np.asarray(x) * run, rtol=1e-6)


def test_dropout_is_captured_with_its_key(launches):
    fn = torch_function(lambda x: torch.nn.functional.dropout(x, 0.5) * 3)
    plain = torch_function(lambda x: torch.nn.functional.dropout(x, 0.5) * 3, replay=False)
    step, x = jax.jit(lambda x, key: fn(x, key=key)), on_gpu(numbers(64))
    masks = set()
    for run in range(10):
        key = jax.random.key(run)
        found = np.asarray(step(x, key))
        np.testing.assert_allclose(found, plain(x, key=key), rtol=1e-6)
        masks.add(tuple(found == 0))
    assert launches
    assert len(masks) == 10


def test_where_addresses_never_come_again_one_graph_serves_all(launches):
    fn = torch_function(layer)
    forward, expected = jax.jit(fn), jax.jit(twin)
    gradient, expected_gradient = (jax.jit(jax.grad(lambda w, x, f=f: jnp.sum(f(w, x) ** 2))) for f in (fn, twin))
    w, kept = on_gpu(numbers(16, 16)), []
    for run in range(40):
        x = on_gpu(numbers(4, 16, seed=run))
        kept += [x, forward(w, x), gradient(w, x)]  # so that their memory is not used again
        np.testing.assert_allclose(kept[-2], expected(w, x), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(kept[-1], expected_gradient(w, x), rtol=2e-3, atol=2e-3)
    assert len(launches) >= 3 * 20


@pytest.mark.parametrize("cls", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_layers_are_launched(cls, launches):
    module = cls(16, 16, num_layers=2, batch_first=True).cuda()
    model, x = TorchModule(module), on_gpu(numbers(4, 6, 16))
    forward = eqx.filter_jit(lambda model, x: model(x)[0])
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model, x: jnp.sum(model(x)[0] ** 2)))
    for run in range(24):  # the last ones are launched, whatever addresses XLA gives
        now = x * (run + 1) / 24
        expected = module(to_torch(now))[0]
        np.testing.assert_allclose(forward(model, now), expected.detach().cpu(), rtol=1e-3, atol=1e-5)
        module.zero_grad()
        (expected**2).sum().backward()
        found = gradient(model, now).params
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(found[name], parameter.grad.cpu(), rtol=1e-3, atol=1e-3)
    assert len(launches) >= 3 * 8
