"""JAX calls inside torch's contexts: autocast, inference mode, no_grad, default devices.

A call computes what it was traced for, on whichever thread it runs; what is off when it is traced stays off.
"""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit, from_torch, torch_gradients
from samples import as_torch
from torchleaf import torch_function

pytestmark = pytest.mark.both_engines(every=4)


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast("cpu", dtype, **options)


def layer(x, w):
    """A product, which autocast does in bfloat16, and a sum, which it does not."""
    return torch.tanh(x @ w), x.sum(0)


X, W = twins.normal((4, 3), (3, 5))


def in_torch(context):
    with context:
        return from_torch(layer(as_torch(X), as_torch(W)))


def total(outputs):
    return sum(y.astype(jnp.float32).sum() for y in jax.tree.leaves(outputs))


def torch_total(outputs):
    return sum(y.float().sum() for y in outputs)


def same(actual, expected, engine="torch"):
    """Bit for bit where torch computes."""
    tolerance = 0 if engine == "torch" else 1e-2  # bfloat16
    assert_trees_close(actual, expected, rtol=tolerance, atol=tolerance)


@eager_and_jit
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_the_call(dtype, jit, engine):
    """What torch gives in the same context; another signature than outside of it."""
    function = torch_function(layer)
    outside, inside = in_torch(contextlib.nullcontext()), in_torch(autocast(dtype))
    assert (outside[0].dtype, inside[0].dtype) == (jnp.float32, from_torch(torch.empty(0, dtype=dtype)).dtype)
    same(jit(lambda *xs: function(*xs))(X, W), outside, engine)
    with autocast(dtype):
        same(jit(lambda *xs: function(*xs))(X, W), inside, engine)
    same(jit(lambda *xs: function(*xs))(X, W), outside, engine)


@eager_and_jit
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_in_autocast(residuals, jit, engine):
    function = torch_function(layer, residuals=residuals)
    with autocast():
        actual = jit(jax.grad(lambda *xs: total(function(*xs)), (0, 1)))(X, W)
        expected = torch_gradients(lambda *xs: torch_total(layer(*xs)), X, W)
    tolerance = 1e-5 if engine == "torch" else 1e-2  # bfloat16
    assert_trees_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_module_in_autocast():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model = torchleaf.TorchModule(module)
    with autocast():
        expected = from_torch(module(as_torch(X)))
        assert expected.dtype == jnp.bfloat16
        for actual in (model(X), eqx.filter_jit(model)(X), jax.vmap(model)(X)):
            assert_trees_close(actual, expected, rtol=1e-2, atol=1e-2)  # bfloat16
    assert model(X).dtype == jnp.float32


@pytest.mark.parametrize("traced", [True, False], ids=["traced inside", "traced outside"])
def test_compiled_programs_do_what_they_were_traced_for(traced):
    """In any context, in the caller's thread (one op) and in XLA's (several), forward and backward."""
    contexts = {True: autocast, False: contextlib.nullcontext}
    function = torch_function(layer)
    programs = {
        "one op": lambda x, w: function(x, w),
        "several": lambda x, w: [function(jnp.sin(x) * i, w) for i in range(3)],
        "gradient": jax.grad(lambda x, w: total(function(x, w)), (0, 1)),
    }
    for program in programs.values():
        compiled = jax.jit(program)
        with contexts[traced]():
            first = compiled(X, W)
        with contexts[not traced]():
            second = compiled(X, W)
        same(second, first)


def test_autocast_switched_off_inside(engine):
    """The function's own context counts."""

    def exact(x, w):
        with torch.autocast("cpu", enabled=False):
            return layer(x, w)

    expected = in_torch(contextlib.nullcontext())
    with autocast():
        same(torch_function(exact)(X, W), expected, engine)


CONTEXTS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device": lambda: torch.device("cpu"),
}
TRANSFORMS = {
    "value": lambda f: f(X, W),
    "gradient": lambda f: jax.grad(lambda *xs: total(f(*xs)), (0, 1))(X, W),
    "compiled gradient": lambda f: jax.jit(jax.grad(lambda *xs: total(f(*xs)), (0, 1)))(X, W),
    "jvp": lambda f: jax.jvp(f, (X, W), (X, W)),
    "vmap of gradient": lambda f: jax.vmap(jax.grad(lambda x: total(f(x, W))))(jnp.stack([X, 2 * X])),
}


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_context_without_effect(context, transform, residuals):
    """Above all, gradients are not those of a torch that keeps no graph: zeros."""
    expected = transform(torch_function(layer, residuals=residuals))
    with context():
        assert_trees_close(transform(torch_function(layer, residuals=residuals)), expected)


def test_module_made_in_inference_mode():
    """Its parameters can never require gradients in torch; as leaves of a model they have them."""
    with torch.inference_mode():
        made = torch.nn.Linear(3, 4)
    model = torchleaf.TorchModule(made)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(X) ** 2))(model)
    expected = jax.grad(lambda p: jnp.sum((X @ p["weight"].T + p["bias"]) ** 2))(model.params)
    assert_trees_close(grads.params, expected, rtol=1e-4)
