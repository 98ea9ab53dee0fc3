"""JAX functions and modules in torch on a GPU: torch's memory and stream, derivatives, and no waiting."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fresh_process import run_python
from on_gpu import cycles, numbers, synchronising_is_an_error
from torch import nn
from torchleaf import JaxModule, jax_function, torch_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch's forward mode uses it
]


def on_cuda(*shape, seed=0):
    return torch.from_numpy(numbers(*shape, seed=seed)).cuda()


def layer(w, x):
    return jnp.tanh(x @ w) * jnp.cos(x)


def twin(w, x):
    return torch.tanh(x @ w) * x.cos()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_values_and_derivatives_are_torchs():
    fn, w, x = jax_function(layer), on_cuda(8, 8), on_cuda(5, 8)
    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(lambda w, x: f(w, x).square().sum(), (0, 1)),
        lambda f: torch.func.hessian(lambda w, x: f(w, x).square().sum()),
        lambda f: lambda w, x: torch.func.jvp(f, (w, x), (x.T @ x, x)),
        lambda f: torch.func.vmap(torch.func.grad(lambda w, x: f(w, x).square().sum()), (None, 0)),
    ):
        actual, expected = transform(fn)(w, x), transform(twin)(w, x)
        close(actual, expected)
        assert all(y.is_cuda for y in jax.tree.leaves(actual))


def test_second_derivatives_by_autograd():
    fn, w, x = jax_function(layer), on_cuda(4, 4).requires_grad_(), on_cuda(3, 4)
    found = []
    for f in (fn, twin):
        (g,) = torch.autograd.grad(f(w, x).square().sum(), w, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), w)[0])
    close(*found)


def test_operands_are_views():
    """Of six operands, none is in XLA's memory; of three results, all are."""
    fn, w, x = jax_function(layer), on_cuda(1024, 1024), on_cuda(1024, 1024)
    fn(w, x)
    torch.cuda.synchronize()
    stats = jax.devices("gpu")[0].memory_stats
    before = stats()["bytes_in_use"]
    results = [fn(w, x) for _ in range(3)]
    torch.cuda.synchronize()
    assert stats()["bytes_in_use"] - before < (len(results) + 1) * w.nbytes


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_parts_of_tensors_that_xla_finds_misaligned(offset):
    fn, x = jax_function(lambda x, y: x * y + 1), on_cuda(65).requires_grad_()
    y = fn(x[offset:], x[:-offset])
    close(y, x[offset:] * x[:-offset] + 1)
    found, expected = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, x[offset:] * x[:-offset] + 1))
    close(found, expected)


def test_batches_of_gradients_and_settings_in_threads_of_autograd():
    fn, w, x = jax_function(layer), on_cuda(64, 64), on_cuda(32, 64)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(lambda w: fn(w, x).sum(0)[:9], w, vectorize=vectorize)
        close(found, torch.autograd.functional.jacobian(lambda w: twin(w, x).sum(0)[:9], w))
    w = w.requires_grad_()
    with jax.default_matmul_precision("highest"):
        y = fn(w, x).square().sum()
    (found,) = torch.autograd.grad(y, w)  # in TF32 it would be off by a thousandth
    (expected,) = torch.autograd.grad(twin(w, x).square().sum(), w)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_order_of_work_on_torchs_stream():
    """What torch writes before, late, is read; what it writes afterwards is not."""
    fn = jax_function(lambda x: x * 2 + 1)
    fn(torch.zeros(1000, device="cuda"))
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            x = torch.zeros(1000, device="cuda")
            for run in range(1, 6):
                torch.cuda._sleep(cycles(0.02))
                x.fill_(run)
                y = fn(x)
                x.fill_(-1)
                close(y, torch.full((1000,), 2.0 * run + 1, device="cuda"))
        stream.synchronize()


def test_training_is_torchs_and_does_not_synchronise():
    torch.manual_seed(0)
    inner = eqx.nn.MLP(16, 4, 32, 1, activation=jnp.tanh, key=jax.random.key(0))
    model = nn.Sequential(nn.Linear(8, 16), JaxModule(inner, axis_name="batch")).cuda()
    first, last = (nn.Linear(ours.in_features, ours.out_features) for ours in inner.layers)
    for theirs, ours in zip((first, last), inner.layers, strict=True):
        theirs.weight.data, theirs.bias.data = (
            torch.tensor(np.asarray(ours.weight)),
            torch.tensor(np.asarray(ours.bias)),
        )
    reference = nn.Sequential(nn.Linear(8, 16), first, nn.Tanh(), last).cuda()
    reference[0].load_state_dict(model[0].state_dict())
    x, y, losses = on_cuda(32, 8), on_cuda(32, 4, seed=1), []
    for trained in (model, reference):
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)

        def step(trained=trained, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (trained(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        found = [step() for _ in range(5)]
        with synchronising_is_an_error():
            found += [step() for _ in range(30)]
        losses.append(torch.stack(found))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_memory_is_flat_over_a_thousand_steps():
    fn, w, x = jax_function(layer), on_cuda(64, 64).requires_grad_(), on_cuda(32, 64)

    def step():
        w.grad = None
        fn(w, x).square().mean().backward()

    for _ in range(20):
        step()
    torch.cuda.synchronize()
    stats = jax.devices("gpu")[0].memory_stats
    before = torch.cuda.memory_allocated(), stats()["bytes_in_use"]
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before[0] + 2**20
    assert stats()["bytes_in_use"] <= before[1] + 2**20


NESTED = """
import sys
sys.path.insert(0, "tests/support")
import jax, jax.numpy as jnp, numpy as np, torch
from torch import nn
from torchleaf import TorchModule, jax_function, torch_function

jax.config.update("jax_default_matmul_precision", "highest")
inner = jax_function(lambda w, x: jnp.tanh(x @ w))
fn = torch_function(lambda w, x: inner(w, x * 2) + x)
w = jax.device_put(np.random.default_rng(0).normal(size=(64, 64)).astype("f") / 8)
x = jax.device_put(np.random.default_rng(1).normal(size=(32, 64)).astype("f"))
loss = lambda w, x: jnp.sum(fn(w, x) ** 2)
right = lambda w, x: jnp.sum((jnp.tanh(2 * x @ w) + x) ** 2)
for transform in (jax.jit, lambda f: jax.jit(jax.value_and_grad(f))):
    expected, step = transform(right)(w, x), transform(loss)
    for found in (transform(loss)(w, x), *(step(w, x) for _ in range(5))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)
print("nested: ok")
"""


def test_jax_in_torch_in_jax():
    """Compiled and autotuned while the program that it is in runs: in a process of its own, as it might hang."""
    assert "nested: ok" in run_python(NESTED, seconds=80, JAX_PLATFORMS="cuda,cpu")


def test_torch_in_jax_in_torch():
    fn = jax_function(lambda w, x: torch_function(twin)(w, x) + 1)
    w, x = on_cuda(8, 8).requires_grad_(), on_cuda(5, 8)
    for run in range(5):
        (found,) = torch.autograd.grad(fn(w, x + run).square().sum(), w)
        (expected,) = torch.autograd.grad((twin(w, x + run) + 1).square().sum(), w)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
