"""Errors that speak of Equinox; `test_every_framework_errors.py` has those of every framework."""

import equinox as eqx
import jax.numpy as jnp
import pytest
import torchleaf
from module_reference import eager_and_filter_jit
from torch import nn
from torchleaf import TorchCallError, TorchModule

pytestmark = pytest.mark.both_engines(every=4)


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: torchleaf.stack([TorchModule(nn.Linear(3, 2)) for _ in range(2)])(x),
            TorchCallError,
            r"Linear: leaf '(weight|bias)' has shape .*stacked model is called under vmap.*eqx\.filter_vmap",
        ),
        (
            lambda x: eqx.partition(TorchModule(nn.Linear(3, 2)), lambda leaf: False)[0](x),
            TypeError,
            r"Linear: leaf '(weight|bias)' is missing.*eqx\.combine",
        ),
        (lambda x: TorchModule(nn.Linear(3, 2)).call("encode", x), AttributeError, "Linear has no method 'encode'"),
        (lambda x: TorchModule(nn.Linear(3, 2)).call("bias", x), AttributeError, "Linear has no method 'bias'"),
    ],
    ids=["stacked", "partitioned", "method", "attribute"],
)
def test_call(jit, call, error, message):
    with pytest.raises(error, match=message):
        jit(call)(jnp.ones((2, 3)))
