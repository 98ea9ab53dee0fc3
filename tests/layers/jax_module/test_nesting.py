"""JAX in torch in JAX, and torch in JAX in torch: values, derivatives, threads, and no deadlock."""

import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import RUNS, assert_trees_close
from fresh_process import run_python
from torch import nn

KEY = jax.random.key(0)


class TorchInJax(eqx.Module):
    layer: torchleaf.TorchModule
    head: eqx.nn.Linear

    def __init__(self):
        self.layer = torchleaf.TorchModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
        self.head = eqx.nn.Linear(4, 2, key=KEY)

    def __call__(self, x):
        return self.head(self.layer(x))


class JaxInTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.inner = torchleaf.JaxModule(eqx.nn.MLP(4, 2, 8, 1, activation=jnp.tanh, key=KEY))

    def forward(self, x):
        return self.inner(self.first(x))


def in_jax(params, x):
    """`JaxInTorch`, in JAX."""
    h = params["first.weight"] @ x + params["first.bias"]
    h = jnp.tanh(params["inner.layers.0.weight"] @ h + params["inner.layers.0.bias"])
    return params["inner.layers.1.weight"] @ h + params["inner.layers.1.bias"]


def in_torch(params, x):
    """`TorchInJax`, in torch."""
    h = torch.tanh(params["layer.params.0.weight"] @ x + params["layer.params.0.bias"])
    return params["head.weight"] @ h + params["head.bias"]


def test_torch_in_jax_in_torch():
    model = torchleaf.JaxModule(TorchInJax())
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = torch.randn(3)
    for _ in range(RUNS):  # the torch ops within are replayed from the third on
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
    expected = in_torch(params, x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, params[name].grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", ["vmap", "hessian", "vmap of grad"])
def test_torch_in_jax_in_torch_func(transform):
    model = torchleaf.JaxModule(TorchInJax())
    params = dict(model.named_parameters())
    x = torch.randn(5, 3)
    transforms = {
        "vmap": lambda f: torch.func.vmap(f)(x),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x[0]),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
    }
    ours, theirs = transforms[transform](model), transforms[transform](lambda x: in_torch(params, x))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_jax_in_torch_in_jax(jit):
    model = torchleaf.TorchModule(JaxInTorch())
    x = jnp.linspace(-1, 1, 3)
    run = jit(eqx.filter_value_and_grad(lambda model, x: jnp.sum(model(x) ** 2)))
    for _ in range(RUNS):
        value, grads = run(model, x)
    expected = jax.value_and_grad(lambda p, x: jnp.sum(in_jax(p, x) ** 2))(model.params, x)
    assert_trees_close((value, grads.params), expected, rtol=1e-4)


TRANSFORMS = {
    "vmap": lambda f, xs: jax.vmap(f)(xs),
    "jvp": lambda f, xs: jax.jvp(f, (xs[0],), (xs[1],)),
    "hessian": lambda f, xs: jax.hessian(f)(xs[0]),
    "vmap of grad": lambda f, xs: jax.vmap(jax.grad(lambda x: f(x).sum()))(xs),
    "scan": lambda f, xs: jax.lax.scan(lambda c, x: (c + f(x), c), jnp.zeros(2), xs),
}


@pytest.mark.long
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_jax_in_torch_in_jaxs_transformations(name, jit):
    model = torchleaf.TorchModule(JaxInTorch())
    xs = jnp.linspace(-1, 1, 15).reshape(5, 3)
    transform = TRANSFORMS[name]
    ours = jit(lambda xs: transform(model, xs))
    for _ in range(RUNS):
        result = ours(xs)
    assert_trees_close(result, transform(lambda x: in_jax(model.params, x), xs), rtol=1e-4, atol=1e-5)


def test_a_jax_function_that_calls_a_torch_function_that_calls_one():
    inner = torchleaf.jax_function(lambda x: jnp.sin(x) * 2)
    middle = torchleaf.torch_function(lambda x: inner(x) + torch.cos(x))
    outer = torchleaf.jax_function(lambda x: middle(x) ** 2)
    x = torch.randn(4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(RUNS):
        x.grad = None
        outer(x).sum().backward()
    (torch.sin(y) * 2 + torch.cos(y)).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_threads_of_both_kinds():
    """Torch's calls of JAX and JAX's calls of torch at the same time, each through the other."""
    torch_model, jax_model = torchleaf.JaxModule(TorchInJax()), torchleaf.TorchModule(JaxInTorch())
    run = eqx.filter_jit(eqx.filter_grad(lambda m, x: m(x).sum()))
    done = []

    def by_torch():
        for _ in range(15):
            x = torch.randn(3, requires_grad=True)
            torch_model(x).sum().backward()
        done.append(x.grad.isfinite().all().item())

    def by_jax():
        for i in range(15):
            grads = run(jax_model, jnp.full(3, float(i)))
        done.append(bool(jnp.isfinite(grads.params["first.weight"]).all()))

    threads = [threading.Thread(target=target, daemon=True) for target in (by_torch, by_jax) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert done == [True] * 4


@pytest.mark.long
def test_many_calls_at_once_in_one_program():
    """More torch calls that call JAX than XLA has threads, all of them ready at the same time."""
    out = run_python(
        """
        import jax, jax.numpy as jnp, torch, torchleaf

        inner = torchleaf.jax_function(lambda x: jnp.linalg.matrix_power(x, 3).sum(0))
        calls = [torchleaf.torch_function(lambda x, i=i: inner(x + i)) for i in range(24)]
        program = jax.jit(lambda x: sum(call(x) for call in calls))
        x = jnp.eye(64)
        for _ in range(4):
            y = program(x)
        expected = sum(jnp.linalg.matrix_power(x + i, 3).sum(0) for i in range(24))
        assert jnp.allclose(y, expected, rtol=1e-3), (y, expected)
        print("done")
        """
    )
    assert out.strip() == "done"


@pytest.mark.long
def test_programs_within_programs_within_programs():
    """Each depth has threads of its own, so that none waits for another's."""
    out = run_python(
        """
        import jax, jax.numpy as jnp, torch, torchleaf
        from torchleaf.interop.process import nesting

        depths = set()

        def square(x):
            depths.add(nesting.depth_here())
            return last(x) * 1

        last = torchleaf.jax_function(lambda x: jnp.linalg.matrix_power(x, 2))
        middle = torchleaf.torch_function(square)
        first = torchleaf.jax_function(lambda x: sum(middle(x + i) for i in range(8)))
        calls = [torchleaf.torch_function(lambda x, i=i: first(x + i).sum(0)) for i in range(8)]
        x = jnp.eye(64)

        def ours(x):
            return sum(call(x) for call in calls)

        def expected(x):
            return sum(jnp.linalg.matrix_power(x + i + j, 2).sum(0) for i in range(8) for j in range(8))

        for _ in range(4):
            assert jnp.allclose(jax.jit(ours)(x), expected(x), rtol=1e-3)
            gradient = jax.jit(jax.grad(lambda x: ours(x).sum()))(x)
            assert jnp.allclose(gradient, jax.grad(lambda x: expected(x).sum())(x), rtol=1e-3)
        assert 2 in depths, depths
        print("done")
        """
    )
    assert out.strip() == "done"
