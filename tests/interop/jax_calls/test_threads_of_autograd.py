"""Derivatives that torch computes later than the call and elsewhere: on a GPU in threads of autograd's own."""

import threading

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch import _C
from torchleaf.interop.internals import transforms
from torchleaf.interop.jax_calls import kernel, settings
from torchleaf.interop.jax_calls.call import JaxCall, aval_of
from torchleaf.interop.jax_calls.op import run_or_trace
from torchleaf.interop.process import nesting

OTHER = {
    "jax_default_matmul_precision": (jax.default_matmul_precision, "highest"),
    "jax_default_prng_impl": (jax.default_prng_impl, "rbg"),
    "jax_threefry_partitionable": (jax.threefry_partitionable, False),
    "jax_numpy_rank_promotion": (jax.numpy_rank_promotion, "raise"),
    "jax_enable_x64": (jax.enable_x64, True),
}


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def function():
    """A function whose forward and backward halves note what JAX's settings are where they are traced."""
    seen = {"forward": [], "backward": []}

    @jax.custom_vjp
    def double(x):
        return 2 * x

    def note(half):
        seen[half].append({name: getattr(jax.config, name) for name in OTHER})

    def forward(x):
        note("forward")
        return 2 * x, None

    def backward(_, ct):
        note("backward")
        return (2 * ct,)

    double.defvjp(forward, backward)
    return torchleaf.jax_function(double), seen


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("run", [lambda work: work(), in_a_thread], ids=["here", "in a thread"])
def test_settings_of_a_call_hold_in_its_backward_half(name, run):
    fn, seen = function()
    x = torch.ones(3, requires_grad=True)
    context, value = OTHER[name]
    for wanted in (value, getattr(jax.config, name)):  # the second call is another one
        with context(wanted):
            y = fn(x)
        x.grad = None
        run(lambda y=y: y.sum().backward())
        torch.testing.assert_close(x.grad, torch.full((3,), 2.0))
        assert seen["forward"][-1][name] == wanted
        assert seen["backward"][-1][name] == wanted
    assert len({now[name] for now in seen["backward"]}) == 2


def test_second_derivatives_have_the_settings_of_the_call():
    fn = torchleaf.jax_function(lambda x, w: jnp.sum((x @ w) ** 3))
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2)
    with jax.enable_x64(True):
        x64, w64 = x.detach().double().requires_grad_(), w.double()
        (gradient,) = torch.autograd.grad(fn(x64, w64), x64, create_graph=True)
    (found,) = in_a_thread(lambda: torch.autograd.grad(gradient.sum(), x64))
    (first,) = torch.autograd.grad(((x @ w) ** 3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_settings_are_left_as_they_were():
    before = settings.settings_here()
    other = [OTHER[name][1] if name in OTHER else now for name, now in zip(settings._CONTEXTS, before, strict=True)]
    with settings.entered(tuple(other)):
        assert settings.settings_here() != before
    assert settings.settings_here() == before


def test_derivatives_within_a_program_know_that_they_are(monkeypatch):
    """They are compiled, and run, as what the program around them does not wait for."""
    depths, run = [], kernel._run
    monkeypatch.setattr(kernel, "_run", lambda *given: (depths.append(nesting.depth_here()), run(*given))[1])
    x = torch.randn(3, requires_grad=True)
    y = nesting.run_at(1, torchleaf.jax_function(jnp.sin), x)
    in_a_thread(lambda: y.sum().backward())
    torch.testing.assert_close(x.grad, x.detach().cos())
    assert depths == [1, 1]


@pytest.fixture
def levels():
    """Two levels of batches of gradients, one within the other."""
    yield _C._vmapmode_increment_nesting(), _C._vmapmode_increment_nesting()
    _C._vmapmode_decrement_nesting()
    _C._vmapmode_decrement_nesting()


@pytest.mark.parametrize("run", [lambda work: work(), in_a_thread], ids=["here", "in a thread"])
def test_batches_of_gradients_are_of_their_own_level(levels, run):
    outer, inner = levels
    call = JaxCall(lambda x, y: [jnp.sin(x) * y], [aval_of((4,), "float32")] * 2, "product")
    x, y = torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(0, 2, 12).view(3, 4)
    given = transforms.batch_of_grads(x, outer), transforms.batch_of_grads(y, inner)
    (found,) = run(lambda: run_or_trace(call, given))
    found = transforms.grads_of_batch(transforms.grads_of_batch(found, inner), outer)
    torch.testing.assert_close(found, torch.sin(x)[:, None] * y)


def test_a_jacobian_in_a_thread():
    fn = torchleaf.jax_function(lambda x: jnp.sin(x) ** 2)
    x = torch.randn(4)
    found = in_a_thread(lambda: torch.autograd.functional.jacobian(fn, x, vectorize=True))
    torch.testing.assert_close(found, torch.diag(torch.sin(2 * x)))
