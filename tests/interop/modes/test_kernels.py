"""Kernels that a call has to do without, and what of torch's is switched off for them."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from torchleaf import TorchModule, to_jax, to_torch, torch_function
from torchleaf.interop.calls.own_functions import applications
from torchleaf.interop.internals import switches
from torchleaf.interop.modes import fake_run
from torchleaf.interop.modes.fake_run import fake_mode
from torchleaf.interop.modes.function_applies import applications_heard_by
from torchleaf.interop.modes.kernels import plain_kernels


def test_flags_that_cannot_be_set(monkeypatch):
    """`torch.backends.disable_global_flags()`, which torch's test tools call when they are imported."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    assert torch.backends.flags_frozen()
    before = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    model, x = TorchModule(torch.nn.LSTM(3, 4)), jnp.ones((5, 3))
    slope = jax.jit(lambda x: jax.jvp(lambda x: model(x)[0].sum(), (x,), (jnp.ones_like(x),))[1])(x)
    assert_trees_close(slope, jax.grad(lambda x: model(x)[0].sum())(x).sum())
    assert_trees_close(torch_function(torch.sin)(x), jnp.sin(x))
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == before


def states():
    """What fake runs and calls switch off in the whole process."""
    return (
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
        switches.VMAP_FALLBACK[0](),
        switches.ONEDNN[0](),
        switches.CUDNN[0](),
        torch.backends.mha.get_fastpath_enabled(),
        torch.autograd.Function.__dict__["apply"],
    )


def test_switches_are_on_again_after_threads_that_overlapped():
    """The first that comes is the first that goes: with what each had found, the last would leave them off for good."""
    before, both, first_is_out = states(), threading.Barrier(2), threading.Event()

    def run(is_first):
        heard = applications() if is_first else applications_heard_by(lambda cls, args, kwargs, run: run(*args))
        with fake_mode(), fake_run._STRICT_VMAP.held(), plain_kernels(), heard:
            both.wait()
            assert states()[:2] == (True, False)
            if not is_first:
                first_is_out.wait()
                assert states()[:2] == (True, False)
        first_is_out.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (True, False)))
    assert states() == before


class OnlyInTraining(torch.autograd.Function):
    """Has no gradient where cuDNN is enabled, as cuDNN's recurrent layers have none in evaluation mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, ct):
        if torch._C._get_cudnn_enabled():
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return ct


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_recurrent_layers_in_evaluation_mode_have_gradients(jit, residuals):
    layer = torch.nn.LSTM(3, 2).eval()

    def run(x, *weights):
        zeros = torch.zeros(1, 4, 2)
        y, *_ = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, False)
        return OnlyInTraining.apply(y)

    fn, ws = torch_function(run, residuals=residuals), [to_jax(w) for w in layer.parameters()]
    x = jnp.linspace(-1, 1, 5 * 4 * 3).reshape(5, 4, 3)
    gradient = jax.grad(lambda x, *ws: jnp.sum(fn(x, *ws) ** 2), argnums=(0, 1))
    gradient = jax.jit(gradient) if jit else gradient
    for shift in range(4):
        leaf = to_torch(x + shift).requires_grad_()
        (layer(leaf)[0] ** 2).sum().backward()
        found = gradient(x + shift, *ws)
        np.testing.assert_allclose(found[0], leaf.grad, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], layer.weight_ih_l0.grad, rtol=1e-4, atol=1e-5)
        layer.zero_grad()
