"""Torch code that writes into its arguments never writes into JAX's arrays, and computes what it does in torch."""

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch
from samples import as_torch, raw_bytes
from torch.nn import functional as F
from torchleaf import to_jax, torch_function

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def _relu_in_place(x, y):
    return F.relu_(x) + y


def _accumulate(x, y):
    y += x
    return y


def _through_a_view(x, y):
    x[0, :2].mul_(0)
    x.T[1] = 5.0
    return x, y


def _out_argument(x, y):
    torch.add(x, 1, out=y)
    return x * y


def _swap(x, y):
    x_before = x.clone()
    x.copy_(y)
    y.copy_(x_before)
    return x, y


def _through_detach(x, y):
    x.detach().add_(1)
    return x * y


def _depending_on_values(x, y):
    if x.sum() > 0:
        x.add_(1)
    return x * y


def _through_numpy(x, y):
    x.numpy()[...] = 7
    return x * y


WRITERS = (
    _relu_in_place,
    _accumulate,
    _through_a_view,
    _out_argument,
    _swap,
    _through_detach,
    _depending_on_values,
    _through_numpy,
)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda fn: fn.__name__.strip("_"))
def test_writes_into_arguments_stay_inside_the_call(writer, jit):
    shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    inspects = writer in (_depending_on_values, _through_numpy)
    fn = torch_function(writer, out_shape=shapes if inspects and jit else None)
    call = jax.jit(fn) if jit else fn
    for sign in (-1, 1):  # the first call is the one that is traced
        x, y = sign * (X + 1), X * 3
        before = raw_bytes(x), raw_bytes(y)
        assert_trees_close(call(x, y), from_torch(writer(as_torch(x), as_torch(y))))
        assert (raw_bytes(x), raw_bytes(y)) == before


def test_writes_do_not_reach_a_view_of_torch_memory():
    tensor = torch.arange(16.0)
    got = torch_function(lambda x: x.mul_(2))(to_jax(tensor))
    assert_trees_close(got, 2 * jnp.arange(16.0))
    assert torch.equal(tensor, torch.arange(16.0))


def test_gradient_through_a_write():
    def in_place(x):
        y = x * 1
        y[0] = 0
        return y.mul_(2).sin().sum()

    def pure(x):
        return jnp.sin(2 * x.at[0].set(0)).sum()

    assert_trees_close(jax.grad(torch_function(in_place))(X), jax.grad(pure)(X))
    argument = torch_function(lambda x: x.exp_().sum())
    assert_trees_close(jax.grad(argument)(X), jnp.exp(X))
