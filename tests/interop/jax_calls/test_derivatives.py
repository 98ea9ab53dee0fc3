"""Derivatives of JAX functions in torch: autograd, forward mode, any order, against finite differences and torch."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode uses it


def mlp_jax(x, w, b):
    return jnp.tanh(x @ w + b) @ w.T, jnp.exp(b)


def mlp_torch(x, w, b):
    return torch.tanh(x @ w + b) @ w.T, torch.exp(b)


def scan_jax(x, w, b):
    def step(h, u):
        return jnp.tanh(h + u @ w + b), h

    last, all_states = jax.lax.scan(step, jnp.zeros_like(b), x)
    return last, all_states


def scan_torch(x, w, b):
    h, states = torch.zeros_like(b), []
    for u in x:
        states.append(h)
        h = torch.tanh(h + u @ w + b)
    return h, torch.stack(states)


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))

PAIRS = {
    "mlp": (mlp_jax, mlp_torch),
    "scan": (scan_jax, scan_torch),
    "passes operands on": (lambda x, w, b: (x, x @ w, b), lambda x, w, b: (x * 1, x @ w, b * 1)),
    "unused": (lambda x, w, b: (jnp.sum(x**3), jnp.zeros(2)), lambda x, w, b: (torch.sum(x**3), torch.zeros(2) * b)),
    "linalg": (
        lambda x, w, b: (jnp.linalg.solve(x.T @ x + jnp.eye(3), w), jnp.linalg.norm(b)),
        lambda x, w, b: (torch.linalg.solve(x.T @ x + torch.eye(3, dtype=x.dtype), w), torch.linalg.norm(b)),
    ),
}


def operands(dtype=torch.float64, grad=True):
    shapes = (4, 3), (3, 2), (2,)
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_against_finite_differences(name, x64):
    f = torchleaf.jax_function(PAIRS[name][0])
    x = operands()
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_against_torch(name):
    ours, theirs = PAIRS[name]
    x = operands(torch.float32)
    results = []
    for f in (torchleaf.jax_function(ours), theirs):
        outs = f(*x)
        loss = sum((y**2).sum() for y in outs)
        grads = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum((g**2).sum() for g in grads), x, create_graph=True, allow_unused=True, materialize_grads=True
        )
        third = torch.autograd.grad(sum((g**2).sum() for g in second), x, allow_unused=True, materialize_grads=True)
        results.append((outs, grads, second, third))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4)


def test_reverse_mode_of_a_function_without_forward_mode(x64):
    f = torchleaf.jax_function(clipped)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(f, [x])
    assert gradgradcheck(f, [x])


COMPLEX = {
    "fft": lambda m: lambda x: m.fft.fft(x),
    "abs": lambda m: lambda x: m.abs(x) ** 2,
    "product": lambda m: lambda x: x * x * (1 + 2j),
    "conjugate": lambda m: lambda x: m.conj(x) * x.imag,
    "from real": lambda m: lambda x: m.exp(1j * x.real),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name, x64):
    x = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    f, g = torchleaf.jax_function(COMPLEX[name](jnp)), COMPLEX[name](torch)
    assert gradcheck(f, [x], check_forward_ad=True)
    assert gradgradcheck(f, [x])
    grads = [torch.autograd.grad((h(x) * (2 - 1j)).sum().abs(), x)[0] for h in (f, g)]
    torch.testing.assert_close(*grads)


def test_only_what_requires_gradients_gets_them(monkeypatch):
    from torchleaf.interop.jax_calls.call import JaxCall

    asked = []
    pull = JaxCall.pull
    x, w, b = operands(torch.float32)
    f = torchleaf.jax_function(mlp_jax)
    frozen = w.detach()
    out, _ = f(x, frozen, b)
    monkeypatch.setattr(
        JaxCall, "pull", lambda self, pullback, present, ct: asked.append(present) or pull(self, pullback, present, ct)
    )
    out.sum().backward()
    assert x.grad is not None
    assert frozen.grad is None
    assert set(asked) == {(0,)}  # the output that was not used has no cotangent


def test_outputs_that_have_no_gradient(x64):
    f = torchleaf.jax_function(lambda x, n: (x[n], n + 1, x > 0, None))
    x, n = torch.randn(3, requires_grad=True, dtype=torch.float64), torch.tensor([0, 2])
    y, m, mask, nothing = f(x, n)
    assert (y.requires_grad, m.requires_grad, mask.requires_grad, nothing) == (True, False, False, None)
    y.sum().backward()
    assert x.grad.tolist() == [1, 0, 1]
    assert torch.equal(m, n + 1)
    assert torch.equal(mask, x > 0)
    none_required = f(x.detach(), n)
    assert not none_required[0].requires_grad


def test_keyword_tensors_and_trees_are_differentiated():
    f = torchleaf.jax_function(lambda tree, *, scale: scale * (tree["a"] * tree["b"][0]).sum())
    a, b, scale = (torch.randn(3, requires_grad=True) for _ in range(3))
    f({"a": a, "b": [b]}, scale=scale).sum().backward()
    torch.testing.assert_close(a.grad, b.detach() * scale.sum().detach())
    torch.testing.assert_close(scale.grad, (a * b).sum().detach().expand(3))


@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((4, 0), (0, 2)), ((0, 0), (0, 0))], ids=str)
def test_empty_operands(shapes):
    x, w = (torch.randn(shape, requires_grad=True) for shape in shapes)

    def derivatives(y):
        first = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
        return y, first, torch.autograd.grad(first[1].sum(), x)

    ours = torchleaf.jax_function(lambda x, w: jnp.sin(x) @ w)(x, w)
    torch.testing.assert_close(derivatives(ours), derivatives(x.sin() @ w))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(mode):
    x = torch.randn(3, requires_grad=True)
    with mode():
        y = torchleaf.jax_function(jnp.sin)(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, torch.sin(x).detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    f = torchleaf.jax_function(lambda x, w: jnp.tanh(x @ w))
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    expected = torch.autograd.grad(torch.tanh(torch.tanh(x @ w) @ w).sum(), (x, w))
    y = checkpoint(f, checkpoint(f, x, w, use_reentrant=use_reentrant), w, use_reentrant=use_reentrant)
    y.sum().backward()
    torch.testing.assert_close((x.grad, w.grad), expected)


def test_saved_tensor_hooks_see_residuals():
    packed = []

    def pack(x):
        packed.append(tuple(x.shape))
        return x.clone()

    x = torch.randn(5, requires_grad=True)
    f = torchleaf.jax_function(lambda x: jnp.sum(jnp.sin(jnp.outer(x, x))))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f(x)
    assert (5, 5) in packed
    y.backward()
    z = x.detach().requires_grad_()
    torch.sin(torch.outer(z, z)).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_residuals_that_are_operands_or_outputs_are_not_kept_twice():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    y = torchleaf.jax_function(lambda x, w: jnp.exp(x @ w))(x, w)
    saved = {z.data_ptr() for z in y.grad_fn.saved_tensors}
    assert saved <= {x.data_ptr(), w.data_ptr(), y.data_ptr()}


def test_writing_into_what_backward_needs_is_an_error():
    x = torch.randn(3, requires_grad=True)
    y = torchleaf.jax_function(jnp.exp)(x)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_and_accumulation():
    x = torch.randn(3, requires_grad=True)
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    f = torchleaf.jax_function(lambda x: x**2)
    for _ in range(2):
        f(x).sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())
    torch.testing.assert_close(seen[0], 2 * x.detach())


def test_retained_graphs():
    x = torch.randn(3, requires_grad=True)
    y = torchleaf.jax_function(jnp.sin)(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, x), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


def test_autocast():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    f = torchleaf.jax_function(lambda x, w: jnp.tanh(x @ w))
    with torch.autocast("cpu", torch.bfloat16):
        h = x @ w
        y = f(h, w.bfloat16())
    assert (h.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
    y.float().sum().backward()
    assert (x.grad.dtype, w.grad.dtype) == (torch.float32, torch.float32)
    assert x.grad.any()


def test_forward_mode_with_requires_grad(x64):
    from torch.autograd import forward_ad

    f = torchleaf.jax_function(lambda x: jnp.sin(x) ** 2)
    x, t = (torch.randn(3, dtype=torch.float64, requires_grad=g) for g in (True, False))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))
        torch.testing.assert_close(y.tangent, torch.sin(2 * x) * t)
        (grad,) = torch.autograd.grad(y.tangent.sum(), x)
    torch.testing.assert_close(grad, 2 * torch.cos(2 * x.detach()) * t)


@pytest.mark.parametrize("vectorize", [False, True])
def test_functional_jacobian(vectorize):
    x = torch.randn(3)
    f = torchleaf.jax_function(lambda x: jnp.outer(x, x).sum(0))
    ours, theirs = (
        torch.autograd.functional.jacobian(g, x, vectorize=vectorize) for g in (f, lambda x: torch.outer(x, x).sum(0))
    )
    torch.testing.assert_close(ours, theirs)
