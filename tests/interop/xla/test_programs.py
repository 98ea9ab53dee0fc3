"""What comes out is ordinary JAX: it exports, loops, differentiates to any order, and compiles for other platforms."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch

pytestmark = pytest.mark.all_cases
XLA = {"engine": "xla", "strict": True}


def _cell():
    cell = torch.nn.GRUCell(3, 4)
    return cell, torchleaf.TorchModule(cell, **XLA)


# --- loops and derivatives ---------------------------------------------------------------------------------


def test_a_cell_in_a_scan_and_its_gradient():
    cell, model = _cell()
    xs, h = torch.randn(6, 2, 3), torch.zeros(2, 4)

    def run(model, xs):
        def step(h, x):
            h = model(x, h)
            return h, h

        return jax.lax.scan(step, jnp.zeros((2, 4)), xs)[1]

    states = []
    for x in xs:
        h = cell(x, h)
        states.append(h)
    assert_trees_close(eqx.filter_jit(run)(model, from_torch(xs)), from_torch(torch.stack(states)), rtol=1e-5)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, xs: jnp.sin(run(m, xs)).sum()))(model, from_torch(xs))
    torch.stack(states).sin().sum().backward()
    expected = {name: from_torch(p.grad) for name, p in cell.named_parameters()}
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-5)


def test_a_while_loop():
    halve = torchleaf.torch_function(lambda x: x / 2, **XLA)
    found = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.max() > 1, halve, x))(jnp.array([9.0, 3.0]))
    assert_trees_close(found, jnp.array([9.0, 3.0]) / 16)


def _energy(x):
    return (torch.nn.functional.softplus(x) * torch.tanh(x.flip(0))).sum() + x.norm()


@pytest.mark.long
def test_hessians_and_third_derivatives():
    ours = torchleaf.torch_function(_energy, **XLA)
    x = torch.tensor([0.3, -0.7, 1.1])
    expected = torch.func.jacrev(torch.func.jacrev(_energy))(x)
    given = from_torch(x)
    for hessian in (jax.hessian(ours), jax.jacrev(jax.grad(ours)), jax.jacrev(jax.jacfwd(ours))):
        assert_trees_close(jax.jit(hessian)(given), from_torch(expected), rtol=1e-4, atol=1e-5)
    third = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(_energy)))(x)
    assert_trees_close(jax.jacfwd(jax.hessian(ours))(given), from_torch(third), rtol=1e-3, atol=1e-4)


def test_taylor_coefficients():
    from jax.experimental.jet import jet

    ours = torchleaf.torch_function(lambda x: torch.sin(x) * torch.exp(x), **XLA)
    x = jnp.array([0.2, 0.5])
    series = [jnp.ones(2), jnp.zeros(2)]
    expected = jet(lambda x: jnp.sin(x) * jnp.exp(x), (x,), (series,))
    assert_trees_close(jet(lambda x: ours(x), (x,), (series,)), expected, rtol=1e-5)


def test_per_example_gradients():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model, xs = torchleaf.TorchModule(module, **XLA), torch.randn(5, 3)
    of_each = eqx.filter_vmap(eqx.filter_grad(lambda m, x: m(x).sum()), in_axes=(None, 0))
    grads = eqx.filter_jit(of_each)(model, from_torch(xs))
    for i, x in enumerate(xs):
        module.zero_grad()
        module(x).sum().backward()
        expected = {name: from_torch(p.grad) for name, p in module.named_parameters()}
        assert_trees_close({k: g[i] for k, g in grads.params.items()}, expected, rtol=1e-4, atol=1e-6)


def test_an_ensemble():
    modules = [torch.nn.Linear(3, 2) for _ in range(3)]
    model = torchleaf.stack([torchleaf.TorchModule(m, **XLA) for m in modules])
    x = torch.randn(4, 3)
    found = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(model, from_torch(x))
    assert_trees_close(found, from_torch(torch.stack([m(x) for m in modules])), rtol=1e-5, atol=1e-6)


def test_recompute_keeps_no_residuals():
    fn = lambda x: torch.sin(torch.exp(x)).sum()  # noqa: E731
    x = jnp.arange(3.0)
    live, recompute = (
        str(jax.make_jaxpr(jax.grad(torchleaf.torch_function(fn, residuals=r, **XLA)))(x))
        for r in ("live", "recompute")
    )
    assert live.count("exp ") < recompute.count("exp ")


# --- loading -------------------------------------------------------------------------------------------------


_LAZY = """
import sys, time
import jax, torch, torchleaf
ops = lambda: [m for m in sys.modules if m.startswith("torchleaf.interop.xla.ops.")]
assert not ops(), ops()
start = time.perf_counter()
from torchleaf.interop.xla.table import load
assert len(load()) > 300
print(time.perf_counter() - start)
assert time.perf_counter() - start < 2, "half a second, on a machine with nothing else to do"
"""


@pytest.mark.long
def test_the_tables_of_ops_are_loaded_when_they_are_needed():
    subprocess.run([sys.executable, "-c", _LAZY], check=True)


def test_a_capture_within_torch_func():
    """Of torch in JAX in torch: none of the transforms that run is in it."""

    def function(x):
        return torch.sin(x) * x.sum()

    ours = torchleaf.jax_function(torchleaf.torch_function(function, engine="xla"))
    xs = torch.linspace(-1, 1, 6).reshape(2, 3)
    found, expected = (torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sum()))(xs) for f in (ours, function))
    torch.testing.assert_close(found, expected)
