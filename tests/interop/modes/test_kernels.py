"""Kernels that a call has to do without, and what of torch's is switched off for them."""

import jax
import jax.numpy as jnp
import torch
from compare import assert_trees_close
from torchleaf import TorchModule, torch_function


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
