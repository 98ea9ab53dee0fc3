"""Callables whose graphs hold themselves, which torch never frees: here they are, with all that they hold."""

import gc

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from torchleaf import TorchCallError, torch_function

X, W = torch.linspace(-1, 1, 6).reshape(2, 3), torch.tensor([0.5, -2.0, 3.0])


class Circular(torch.autograd.Function):
    """`sin(x) * w`; `keep(ctx, f, y)` says how it holds its output."""

    @staticmethod
    def forward(ctx, keep, x, w):
        ctx.save_for_backward(x, w)
        y = torch.sin(x) * w
        keep(ctx, y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return None, gradient * torch.cos(x) * w, (gradient * torch.sin(x)).sum(0)


def _attribute(ctx, y):
    ctx.output = y


def _list_of_tuples(ctx, y):
    ctx.steps = [(y, 0.5)]


def _closure(ctx, y):
    ctx.again = lambda: y


def _computed_from(ctx, y):
    ctx.box = {"later": [y.view(-1)]}


def _object(ctx, y):
    ctx.solver = type("Solver", (), {})()
    ctx.solver.solution = y


KEEPS = [_attribute, _list_of_tuples, _closure, _computed_from, _object]
each_keep = pytest.mark.parametrize("keep", KEEPS, ids=lambda f: f.__name__.strip("_"))


def nodes():
    gc.collect()
    return sum(issubclass(type(x), torch.autograd.function.BackwardCFunction) for x in gc.get_objects())


@pytest.mark.long
@each_keep
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_graphs_that_hold_themselves_are_freed(keep, reads, jit):
    """With operands of XLA's in a closure, and among what is saved."""

    def fn(x, w):
        if reads and x.sum() > 1e9:
            return x
        return Circular.apply(lambda ctx, y: (keep(ctx, y), setattr(ctx, "f", lambda: (x, w))), x * 1, w)

    function, counts = torch_function(fn), []
    step = jit(jax.value_and_grad(lambda x, w: (function(x, w) ** 2).sum(), argnums=(0, 1)))
    for factor in (1, 2, -1, 0.5):
        x, w = (X * factor).requires_grad_(), W.clone().requires_grad_()
        expected = (torch.sin(x) * w).square().sum()
        wanted = expected, torch.autograd.grad(expected, (x, w))
        assert_trees_close(step(from_torch(x.detach()), from_torch(W)), jax.tree.map(from_torch, wanted))
        counts.append(nodes())
    assert counts[1:] == counts[:-1]  # a trace may leave one, without memory


@each_keep
def test_a_graph_of_the_users_own_that_holds_itself_stays(keep):
    """What else is alive of that kind is none of a call's."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    own = Circular.apply(keep, x, w)
    function = torch_function(lambda x, w: Circular.apply(keep, x * 1, w))
    jax.block_until_ready(jax.grad(lambda x: function(x, from_torch(W)).sum())(from_torch(X)))
    assert len(vars(own.grad_fn)) > 0
    assert torch.equal(torch.autograd.grad(own.sum(), x)[0], (torch.cos(X) * W))
    vars(own.grad_fn).clear()


def test_an_operand_that_something_else_holds_too_is_refused():
    kept = []

    def fn(x):
        y = Circular.apply(_attribute, x * 1, x[0])
        if x.sum() < 1e9:
            kept.append(x)
        return y

    with pytest.raises(TorchCallError, match="keeps argument x"):
        torchleaf.torch_function(fn)(jnp.ones((2, 3)))
