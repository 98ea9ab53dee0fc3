"""Slices and looked-up rows made no longer than a bound, by every norm: values, what is written, gradients."""

import math

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, from_torch

pytestmark = pytest.mark.all_cases
NORMS = [0.5, 1, 2, 3, math.inf]
ROWS = torch.tensor([[0, 2], [2, 4]])


def weights(dtype=torch.float32):
    return torch.linspace(-3, 3, 24).reshape(6, 4).to(dtype)


def by_xla(fn):
    return torchleaf.torch_function(fn, engine="xla", strict=True)


@pytest.mark.long
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("norm", NORMS)
def test_slices(norm, dim):
    def renormed(x):
        return torch.renorm(x, norm, dim, 1.5)

    x = weights()
    assert_trees_close(by_xla(renormed)(from_torch(x)), from_torch(renormed(x)))
    (gradient,) = torch.autograd.grad(renormed(x.requires_grad_()).pow(3).sum(), x)
    actual = jax.grad(lambda x: jnp.sum(by_xla(renormed)(x) ** 3))(from_torch(x.detach()))
    assert_trees_close(actual, from_torch(gradient), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_are_looked_up(norm, dtype):
    def looked_up(table):
        table = table.clone()
        return F.embedding(ROWS, table, max_norm=1.0, norm_type=norm), table

    expected = looked_up(weights(dtype))
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    assert_trees_close(by_xla(looked_up)(from_torch(weights(dtype))), from_torch(expected), **close)


def test_gradients_of_rows_are_torchs():
    def loss(table):
        return F.embedding(ROWS, table.clone(), max_norm=1.0).pow(3).sum()

    table = weights().requires_grad_()
    (expected,) = torch.autograd.grad(loss(table), table)
    assert_trees_close(jax.grad(by_xla(loss))(from_torch(weights())), from_torch(expected))
