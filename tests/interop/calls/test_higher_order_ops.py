"""torch's higher-order ops inside calls: values, gradients, batches, random numbers and writes within them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from fresh_process import run_python
from samples import as_torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torchleaf import RandomnessError, torch_function

RUNS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # in scan's backward pass
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # likewise
]


def branch(x):
    return torch.cond(x.sum() > 0, torch.sin, lambda x: x.cos() * 2, (x,))


def branch_on_a_constant(x):
    return torch.cond(torch.tensor(True), torch.sin, torch.cos, (x,))


def counted_loop(x):
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 1.5), (torch.tensor(0), x))[1]


def loop_until(x):
    return while_loop(lambda y: y.abs().sum() < 100, lambda y: (y * 2,), (x,))[0]


def scanned(x):
    return scan(lambda carry, y: (carry + y, carry * y), x[0], x, dim=0)[1]


def summed_up(x):
    return associative_scan(lambda a, b: a + b, x, dim=0, combine_mode="generic")


def mapped(x):
    return map_over(lambda y: y.sin() * y, x)


def attention(x):
    q = x.reshape(1, 1, *x.shape)
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))[0, 0]


FORWARD = (branch, branch_on_a_constant, counted_loop, loop_until, scanned, summed_up, mapped, attention)
DIFFERENTIABLE = (branch, branch_on_a_constant, counted_loop, scanned, summed_up, mapped)


def inputs(run):
    return jnp.asarray(np.random.default_rng(run).normal(size=(4, 3)), jnp.float32) + (1 if run % 2 else -1)


@pytest.fixture(autouse=True)
def _compiler_starts_anew():
    torch._dynamo.reset()


@pytest.mark.parametrize("function", FORWARD)
def test_values(function):
    expected = [from_torch(function(as_torch(inputs(run)))) for run in range(RUNS)]
    wrapped = torch_function(function)
    program = jax.jit(wrapped)
    for run in range(RUNS):
        assert_trees_close(program(inputs(run)), expected[run], rtol=1e-5)
    assert_trees_close(wrapped(inputs(0)), expected[0], rtol=1e-5)
    assert_trees_close(jax.vmap(wrapped)(jnp.stack([inputs(0), inputs(1)])), jnp.stack(expected[:2]), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradients_and_forward_mode(function, residuals):
    """torch keeps no graph of the gradients of some; forward mode is right all the same."""

    def expected(x):
        leaf = as_torch(x).requires_grad_()
        (function(leaf) ** 2).sum().backward()
        return from_torch(leaf.grad)

    grads = [expected(inputs(run)) for run in range(RUNS)]
    wrapped = torch_function(function, residuals=residuals)

    def loss(x):
        return (wrapped(x) ** 2).sum()

    step = jax.jit(jax.grad(loss))
    for run in range(RUNS):
        assert_trees_close(step(inputs(run)), grads[run], rtol=1e-4)
    assert_trees_close(jax.grad(loss)(inputs(0)), grads[0], rtol=1e-4)
    tangent = jnp.cos(inputs(1))
    assert_trees_close(jax.jvp(loss, (inputs(0),), (tangent,))[1], (grads[0] * tangent).sum(), rtol=1e-4)


def drops(x):
    return torch.cond(x.sum() > 0, lambda x: nn.functional.dropout(x, 0.5), lambda x: x * 2, (x,))


def test_random_numbers_within():
    function = torch_function(drops)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 3))
    results = [function(x, key=key) for key in keys]
    assert len({y.tobytes() for y in results}) == 4
    assert_trees_close([jax.jit(function)(x, key=key) for key in keys], results)
    assert_trees_close(function(-x, key=keys[0]), -2 * x)
    with pytest.raises(RandomnessError, match="drops draws random numbers"):
        function(x)


def test_values_read_beside_it():
    def function(x):
        assert not x.isnan().any()
        return branch(x)

    expected = [from_torch(function(as_torch(inputs(run)))) for run in range(RUNS)]
    program = jax.jit(torch_function(function))
    for run in range(RUNS):
        assert_trees_close(program(inputs(run)), expected[run])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x).tanh(), (x,))


@pytest.mark.long
def test_modules():
    module = Gated()
    expected, grads = [], []
    for run in range(RUNS):
        module.zero_grad()
        y = module(as_torch(inputs(run)))
        y.sum().backward()
        expected.append(from_torch(y))
        grads.append(
            {n: from_torch(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}
        )
    model = torchleaf.TorchModule(module)
    call = eqx.filter_jit(lambda model, x: model(x))
    step = eqx.filter_jit(eqx.filter_grad(lambda model, x: model(x).sum()))
    for run in range(RUNS):
        assert_trees_close(call(model, inputs(run)), expected[run], rtol=1e-5)
        assert_trees_close(step(model, inputs(run)).params, grads[run], rtol=1e-4)


@pytest.mark.long
def test_the_first_call_of_a_process_spoils_nothing_for_the_compiler():
    """What it meets in a mode it never compiles again; here it does, within torchleaf and outside."""
    run_python(
        """
        import warnings
        import jax, jax.numpy as jnp, torch, torchleaf
        from torch.nn.attention.flex_attention import flex_attention

        warnings.filterwarnings("ignore", message="flex_attention called without")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        x = torch.linspace(0, 1, 12).reshape(1, 1, 4, 3)
        function = torchleaf.torch_function(lambda x: flex_attention(x, x, x))
        y = jax.jit(function)(jnp.asarray(x.numpy()))
        assert torch.allclose(torchleaf.to_torch(y), flex_attention(x, x, x))
        assert torch.allclose(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), x.sin())
        """
    )
