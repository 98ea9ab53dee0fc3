"""`torch.compile` takes a JAX function as one step of one graph."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler's own making
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BACKENDS = ["eager", "aot_eager", "inductor"]


@torchleaf.jax_function
def in_jax(x, w, *, scale=1.0):
    return {"y": jnp.tanh(x @ w) * scale, "largest": jnp.argmax(x @ w, -1)}


def in_torch(x, w, *, scale=1.0):
    return {"y": torch.tanh(x @ w) * scale, "largest": torch.argmax(x @ w, -1)}


def program(f):
    def run(x, w):
        out = f(torch.relu(x) + 1, w, scale=2.0)
        return out["y"].square().sum() * 3, out["largest"]

    return run


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend):
    compiled = torch.compile(program(in_jax), backend=backend, fullgraph=True)
    for rows in (4, 4, 5, 6):  # from the second size on, sizes are symbols
        x, w = torch.randn(rows, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        results = []
        for run in (compiled, program(in_torch)):
            y, largest = run(x, w)
            results.append((y, largest, torch.autograd.grad(y, (x, w))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_one_graph():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch.compile(program(in_jax), backend=backend)(torch.randn(4, 3), torch.randn(3, 2))
    assert len(graphs) == 1


def test_jax_is_traced_while_the_graph_is_and_never_after():
    traces = []

    @torchleaf.jax_function
    def f(x):
        traces.append(0)
        return jnp.sin(x)

    compiled = torch.compile(lambda x: f(x * 2).sum(), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.randn(3, requires_grad=True)).backward()
    n = len(traces)
    for _ in range(3):
        compiled(torch.randn(3, requires_grad=True)).backward()
    assert n == len(traces) > 0


@pytest.mark.long
def test_a_module_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 1)
            self.middle = torchleaf.jax_function(jax.nn.gelu)

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    x, target = torch.randn(32, 3), torch.randn(32, 1)
    losses = []
    for compiles in (True, False):
        torch.manual_seed(1)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        step = torch.compile(net, backend="inductor", fullgraph=True) if compiles else net
        history = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(step(x), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_func_within(backend):
    f = torchleaf.jax_function(lambda x: jnp.sum(jnp.sin(x) ** 2))
    g = lambda x: torch.sum(torch.sin(x) ** 2)  # noqa: E731
    x = torch.randn(4, 3)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(f), lambda f: torch.func.vmap(torch.func.grad(f))):
        compiled = torch.compile(transform(f), backend=backend)
        torch.testing.assert_close(compiled(x), transform(g)(x))
