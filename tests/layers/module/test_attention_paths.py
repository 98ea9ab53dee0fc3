"""torch's fast path for attention in inference: taken where it computes the function whose gradients are taken."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from torch import nn
from watching import OpLog

FAST = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


@pytest.fixture
def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)


@pytest.fixture
def log(monkeypatch):
    """The ops of modules as compiled programs run them."""
    log = OpLog()
    monkeypatch.setattr(nn.TransformerEncoder, "forward", log.wrap(nn.TransformerEncoder.forward))
    return log


def fast_calls(log):
    return sum(log.counts[op] for op in FAST)


def test_without_a_mask_it_is_taken(encoder, x, log):
    model = torchleaf.TorchModule(encoder)
    actual = eqx.filter_jit(model)(x)
    assert fast_calls(log) == 2
    with torch.no_grad():
        assert_trees_close(actual, from_torch(encoder(torchleaf.to_torch(x))), rtol=1e-4)


MASKS = {
    "padding": {"src_key_padding_mask": jnp.array([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
    "causal": {"mask": jnp.triu(jnp.full((5, 5), -jnp.inf), 1)},
}
FLAGS = {"is_causal": False}  # else the encoder compares the mask's values with a causal one's


@pytest.mark.long
@pytest.mark.parametrize("mask", MASKS)
def test_with_a_mask_a_function_and_its_gradient_are_of_one_function(encoder, x, mask, log):
    model = torchleaf.TorchModule(encoder)
    call = eqx.filter_jit(lambda x: model(x, **MASKS[mask], **FLAGS))
    value = call(x)
    assert fast_calls(log) == 0
    differentiated, _ = jax.vjp(call, x)
    assert_trees_close(value, differentiated)
    arguments = torchleaf.to_torch(MASKS[mask])
    assert_trees_close(value, from_torch(encoder(torchleaf.to_torch(x), **arguments, **FLAGS).detach()), rtol=1e-4)


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_do_not_take_it(encoder, x, residuals, log):
    model = torchleaf.TorchModule(encoder, residuals=residuals)
    jax.block_until_ready(eqx.filter_jit(eqx.filter_grad(lambda m: m(x).sum()))(model))
    assert fast_calls(log) <= (2 if residuals == "recompute" else 0)


def test_torchs_own_switch_is_left_as_it_was(encoder, x):
    eqx.filter_jit(torchleaf.TorchModule(encoder))(x, **MASKS["padding"], **FLAGS).block_until_ready()
    assert torch.backends.mha.get_fastpath_enabled()
