"""A call that is linear, transposed as JAX's own functions are: by `jax.linear_transpose` and in linear solvers."""

import jax
import jax.numpy as jnp
import pytest
import torch
import twins
from compare import assert_trees_close
from torchleaf import torch_function

W, X = twins.normal((4, 4))[0] / 4 + 2 * jnp.eye(4), twins.normal((4,))[0]


def linear(w, x):
    return w @ x


def linearized(fn, w):
    return jax.linearize(lambda x: fn(w, x), jnp.zeros_like(X))[1]


def test_what_is_not_known_to_be_linear_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"jax\.linearize\(f, x\)\[1\].*engine='xla'"):
        jax.linear_transpose(lambda x: torch_function(linear)(W, x), X)(X)


def test_the_remedies():
    by_xla = torch_function(linear, engine="xla")
    for f in (linearized(torch_function(linear), W), lambda x: by_xla(W, x)):
        assert_trees_close(jax.linear_transpose(f, X)(X), (W.T @ X,), rtol=1e-5)


def test_xla_refuses_what_is_not_linear():
    with pytest.raises(NotImplementedError, match="Transpos"):
        jax.linear_transpose(torch_function(torch.sin, engine="xla"), X)(X)


@pytest.mark.parametrize("solver", [jax.scipy.sparse.linalg.gmres, jax.scipy.sparse.linalg.bicgstab])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradients_of_linear_solvers(solver, jit):
    def gradients(matvec_of):
        return jit(jax.grad(lambda w, b: jnp.sum(solver(matvec_of(w), b)[0] ** 2), (0, 1)))(W, X)

    expected = gradients(lambda w: lambda x: w @ x)
    by_torch, by_xla = torch_function(linear), torch_function(linear, engine="xla")
    assert_trees_close(gradients(lambda w: linearized(by_torch, w)), expected, rtol=1e-3, atol=1e-4)
    assert_trees_close(gradients(lambda w: lambda x: by_xla(w, x)), expected, rtol=1e-3, atol=1e-4)
