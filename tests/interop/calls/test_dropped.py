"""Functions and modules that nobody has any more are freed, with their programs and all that they hold."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torchleaf.interop.calls.residuals import live_graphs
from torchleaf.interop.transport import program


class Held:
    """Something that a function holds."""


def _function():
    held = Held()

    def double(x):
        assert held is not None
        return x * 2

    return torchleaf.torch_function(double), weakref.ref(held)


def _module():
    class Own(torch.nn.Linear):
        def forward(self, x):
            assert self.held is not None
            return super().forward(x)

    module = Own(3, 3)
    module.held = Held()
    model = torchleaf.TorchModule(module)
    return model, weakref.ref(model.module.skeleton.held)


X = jnp.ones(3)
USES = {
    "call": lambda f: f(X),
    "jit": lambda f: jax.jit(lambda x: f(x))(X),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(X),
    "grad of jit": lambda f: jax.grad(lambda x: jax.jit(lambda x: f(x))(x).sum())(X),
    "vmap": lambda f: jax.vmap(lambda x: f(x))(X[None]),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(X[None]),
    "jvp": lambda f: jax.jvp(lambda x: f(x), (X,), (X,)),
    "hessian": lambda f: jax.hessian(lambda x: (f(x) ** 2).sum())(X),
    "scan": lambda f: jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3))(X),
    "linearize": lambda f: jax.linearize(lambda x: f(x), X)[1](X),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(X),
    "vjp never used": lambda f: jax.vjp(lambda x: f(x), X)[0],
}


@pytest.mark.parametrize("make", [_function, _module], ids=["function", "module"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_dropped_is_freed(make, use):
    function, held = make()
    for _ in range(2):
        jax.block_until_ready(use(function))
    assert held() is not None
    del function
    gc.collect()
    assert held() is None
    assert live_graphs() == 0


@pytest.mark.long
def test_three_hundred_cost_no_programs():
    gc.collect()
    before = len(program._by_number)
    for _ in range(300):
        _function()[0](X)
    gc.collect()
    assert len(program._by_number) <= before


def test_models_of_one_class_share_a_program():
    """Also where JAX holds on to what it compiled for good, as for static arguments."""
    call = eqx.filter_jit(lambda m, x: m(x))
    call(torchleaf.TorchModule(torch.nn.Linear(3, 3)), X)
    before = len(program._by_number)
    for _ in range(10):
        call(torchleaf.TorchModule(torch.nn.Linear(3, 3)), X)
    assert len(program._by_number) == before
