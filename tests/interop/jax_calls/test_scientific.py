"""What a torch user reaches to JAX for: ODE solvers, implicit layers, losses; against finite differences and torch."""

import diffrax
import jax
import jax.numpy as jnp
import optax
import optimistix
import pytest
import torch
import torchleaf
from torch.autograd import gradcheck


def test_an_implicit_layer_with_custom_root(x64):
    """x with x = tanh(w x + b), whose derivative JAX has by the implicit function theorem."""

    def solve(w, b):
        f = lambda x: jnp.tanh(w @ x + b) - x  # noqa: E731
        iterate = lambda f, x: jax.lax.fori_loop(0, 100, lambda _, x: x + f(x), x)  # noqa: E731
        tangent = lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y)  # noqa: E731
        return jax.lax.custom_root(f, jnp.zeros_like(b), iterate, tangent)

    layer = torchleaf.jax_function(solve)
    w = (torch.randn(3, 3, dtype=torch.float64) / 4).requires_grad_()
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (w, b), check_forward_ad=False)
    x = torch.zeros(3, dtype=torch.float64)
    for _ in range(100):
        x = torch.tanh(w @ x + b)
    torch.testing.assert_close(layer(w, b), x)
    torch.testing.assert_close(
        torch.autograd.grad(layer(w, b).sum(), (w, b)), torch.autograd.grad(x.sum(), (w, b)), rtol=1e-6, atol=1e-8
    )


def test_an_optax_loss():
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))
    loss = torchleaf.jax_function(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, expected)
    weights = torch.randn(6)
    ours, theirs = (torch.autograd.grad(y, logits, weights)[0] for y in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.long
def test_a_neural_ode_of_diffrax(x64):
    def flow(w, y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.1,
            y0=y0,
            args=w,
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
        )
        return solution.ys[0]

    f = torchleaf.jax_function(flow)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y, steps = y0, 4000
    for _ in range(steps):  # the midpoint rule
        y = y + torch.tanh(w @ (y + torch.tanh(w @ y) / (2 * steps))) / steps
    torch.testing.assert_close(f(w, y0), y, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(out.square().sum(), (w, y0)) for out in (f(w, y0), y))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    batch = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(f, (None, 0))(w, batch)[1], f(w, batch[1]), rtol=1e-5, atol=1e-6)


def test_a_root_of_optimistix(x64):
    def solve(a):
        return optimistix.root_find(lambda x, a: x**3 + x - a, optimistix.Newton(1e-10, 1e-10), jnp.ones(()), a).value

    f = torchleaf.jax_function(solve)
    a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = f(a)
    assert (x**3 + x - a).abs() < 1e-8
    (grad,) = torch.autograd.grad(x, a)
    torch.testing.assert_close(grad, 1 / (3 * x.detach() ** 2 + 1))
