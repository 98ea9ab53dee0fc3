"""What `TorchModule` is in Equinox's terms: its fields and its static part; see `test_every_framework.py`."""

import equinox as eqx
import jax.numpy as jnp
import pytest
import torchleaf
from torch import nn

pytestmark = pytest.mark.both_engines


def test_fields():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    module[0].requires_grad_(False)
    model = torchleaf.TorchModule(module)
    assert list(model.params) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(model.frozen) == ["0.weight", "0.bias"]
    assert list(model.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert model.inference is True
    assert torchleaf.TorchModule(nn.Linear(3, 4)).inference is False


@pytest.mark.long
def test_equal_structure_means_one_compilation():
    model, traces = torchleaf.TorchModule(nn.Linear(3, 4)), []

    @eqx.filter_jit
    def call(model, x):
        traces.append(1)
        return model(x)

    call(model, jnp.ones(3))
    call(eqx.tree_at(lambda m: m.params["bias"], model, jnp.ones(4)), jnp.ones(3))
    call(torchleaf.load_state_dict(model, nn.Linear(3, 4).state_dict()), jnp.ones(3))
    assert len(traces) == 1
