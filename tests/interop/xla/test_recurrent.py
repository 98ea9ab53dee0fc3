"""Recurrent layers in half precision, whose states keep their dtype from step to step."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from torch import nn

LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, bidirectional=True),
    "LSTM with projections": lambda: nn.LSTM(3, 4, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4, batch_first=True),
    "RNN": lambda: nn.RNN(3, 4, num_layers=2, nonlinearity="relu"),
    "without biases": lambda: nn.LSTM(3, 4, bias=False),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_half_precision(make, dtype):
    torch.manual_seed(0)
    layer, x = make().to(dtype), torch.randn(5, 2, 3).to(dtype)
    model = torchleaf.TorchModule(layer, engine="xla", strict=True)
    close = {"rtol": 0, "atol": 4e-2 if dtype == torch.bfloat16 else 4e-3}
    assert_trees_close(model(from_torch(x)), from_torch(layer(x)), **close)

    wide, x = layer.float(), x.float().requires_grad_()
    wide(x)[0].sin().sum().backward()
    gradient = jax.grad(lambda x: jnp.sin(model(x)[0]).sum(dtype=jnp.float32))(from_torch(x).astype(_in_jax(dtype)))
    assert gradient.dtype == _in_jax(dtype)
    assert_trees_close(gradient.astype(jnp.float32), from_torch(x.grad), **close)


def _in_jax(dtype):
    return jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float16
