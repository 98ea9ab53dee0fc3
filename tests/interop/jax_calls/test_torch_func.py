"""JAX functions under torch.func: every transform, nested, against the same thing written in torch."""

import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def in_jax(x, w, b):
    y = jnp.tanh(x @ w + b)
    return y * jnp.exp(b), y.sum(0)


def in_torch(x, w, b):
    y = torch.tanh(x @ w + b)
    return y * torch.exp(b), y.sum(0)


def loss(f):
    return lambda *args: sum((y**2).sum() for y in f(*args))


def summed(f):
    return lambda *args: sum((y**2).sum() for y in torch.utils._pytree.tree_leaves(f(*args)))


X_ONLY, X_AND_B = (0, None, None), (0, None, 0)
PLAIN = {
    "grad": lambda f: grad(loss(f), (0, 1, 2)),
    "grad of one": lambda f: grad(loss(f), 1),
    "grad_and_value": lambda f: grad_and_value(loss(f)),
    "vjp": lambda f: lambda *a: vjp(f, *a)[1](f(*a)),
    "jvp": lambda f: lambda *a: jvp(f, a, a),
    "linearize": lambda f: lambda *a: linearize(f, *a)[1](*a),
    "jacrev": lambda f: jacrev(f, (0, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 2)),
    "hessian": lambda f: hessian(loss(f), (0, 1)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(loss(f), 1), 2),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(loss(f), 1), 2),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(loss(f), 1), 2),
    "grad of grad": lambda f: grad(summed(grad(loss(f), (0, 1))), (0, 1, 2)),
    "third": lambda f: grad(summed(grad(summed(grad(loss(f))), 1)), 2),
    "hvp": lambda f: lambda *a: jvp(grad(loss(f), (0, 1, 2)), a, a)[1],
    "jvp of jvp": lambda f: lambda *a: jvp(lambda *b: jvp(f, b, b), a, a),
}
BATCHED = {
    "vmap": lambda f: vmap(f, X_ONLY),
    "vmap of several": lambda f: lambda x, w, b: vmap(f, X_AND_B)(x, w, b.expand(5, 2)),
    "vmap out_dims": lambda f: vmap(f, X_ONLY, out_dims=(1, 0)),
    "vmap of grad": lambda f: vmap(grad(loss(f), (0, 1)), X_ONLY),
    "grad of vmap": lambda f: grad(loss(vmap(f, X_ONLY)), (0, 1, 2)),
    "vmap of hessian": lambda f: vmap(hessian(loss(f), 2), X_ONLY),
    "jvp of vmap": lambda f: lambda *a: jvp(vmap(f, X_ONLY), a, a),
    "vmap of jvp": lambda f: vmap(lambda *a: jvp(f, a, a), X_ONLY),
    "grad of vmap of grad": lambda f: grad(summed(vmap(grad(loss(f), 1), X_ONLY)), (0, 1, 2)),
    "vmap of grad of grad": lambda f: vmap(grad(summed(grad(loss(f), (0, 1))), 1), X_ONLY),
    "vmap of vmap": lambda f: vmap(vmap(f, X_ONLY), (1, None, None)),
    "grad of vmap of vmap": lambda f: grad(loss(vmap(vmap(f, X_ONLY), (1, None, None))), (0, 1)),
    "jacrev of vmap of jvp": lambda f: jacrev(lambda *a: vmap(lambda *c: jvp(f, c, c)[1][1], X_ONLY)(*a), 2),
}


def operands(*shape):
    return tuple(torch.randn(s, dtype=torch.float64) for s in ((*shape, 3), (3, 2), (2,)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, of `linearize`
@pytest.mark.parametrize("name", PLAIN)
def test_transforms(name, x64):
    x = operands(4)
    torch.testing.assert_close(PLAIN[name](torchleaf.jax_function(in_jax))(*x), PLAIN[name](in_torch)(*x))


@pytest.mark.parametrize("name", BATCHED)
def test_batches(name, x64):
    x = operands(5, 4) if "vmap of vmap" not in name else operands(5, 4, 3)
    torch.testing.assert_close(BATCHED[name](torchleaf.jax_function(in_jax))(*x), BATCHED[name](in_torch)(*x))


def test_vmap_with_integers_and_static_leaves(x64):
    f = torchleaf.jax_function(lambda x, n, *, flip: (-x[n] if flip else x[n], n))
    x, n = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 0])
    values, indices = vmap(lambda x, n: f(x, n, flip=True))(x, n)
    torch.testing.assert_close(values, -x[torch.arange(4), n])
    assert torch.equal(indices, n)


def test_gradients_of_a_vmap_are_summed_in_jax(x64):
    """Weights that are not batched get one gradient, not one an example."""
    from torchleaf.interop.jax_calls import kernel

    sizes = []
    run = kernel.run
    f = torchleaf.jax_function(in_jax)
    x, w, b = operands(5, 4)
    w.requires_grad_()
    y = loss(vmap(f, X_ONLY))(x, w, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torchleaf.interop.jax_calls.op.run",
            lambda call, tensors: sizes.append([a.shape for a in call.out_avals]) or run(call, tensors),
        )
        y.backward()
    assert sizes == [[(3, 2)]]
    torch.testing.assert_close(w.grad, grad(loss(vmap(in_torch, X_ONLY)), 1)(x, w.detach(), b))


def test_functional_call():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 2))
            self.f = torchleaf.jax_function(lambda x, w: jnp.tanh(x @ w))

        def forward(self, x):
            return self.f(x, self.weight)

    net, x = Net(), torch.randn(5, 3)
    weights = {"weight": torch.randn(4, 3, 2)}
    out = vmap(lambda w: functional_call(net, w, x))(weights)
    torch.testing.assert_close(out, torch.tanh(x @ weights["weight"]))
    per_example = vmap(grad(lambda w, x: functional_call(net, w, x).sum()), (None, 0))(dict(net.named_parameters()), x)
    expected = vmap(grad(lambda w, x: torch.tanh(x @ w).sum()), (None, 0))(net.weight, x)
    torch.testing.assert_close(per_example["weight"], expected)
