"""Calls that would lose state, or mix it up, are refused with a remedy."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from stateful_layers import UPDATES, MovingAverage, each, make
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


@pytest.mark.usefixtures("readable")
@each
def test_without_state_a_change_is_an_error(spec):
    """Of the trace where torch code can be traced, naming the buffers and the remedy."""
    model, errors = torchleaf.TorchModule(spec.make()), torchleaf.StateError
    if spec.reads_values:
        errors = (jax.errors.JaxRuntimeError, ValueError)
    with pytest.raises(errors, match=r"changes buffer `[\w.]+`.*eqx.nn.make_with_state.*inference_mode"):
        jax.block_until_ready(jax.jit(lambda x: model(x))(jnp.ones(spec.shape)))


def test_a_stateful_model_wants_its_state():
    model, state = make(nn.BatchNorm1d(3))
    x = jnp.ones((4, 3))
    with pytest.raises(torchleaf.StateError, match=r"Pass it: `output, state = model\(x, state=state\)`"):
        model(x)
    with pytest.raises(AttributeError, match=r"state.get\(model.buffer_index\)"):
        _ = model.buffers
    for function in (torchleaf.state_dict, torchleaf.to_torch_module):
        with pytest.raises(torchleaf.StateError, match=r"the buffers are in the eqx.nn.State"):
            function(model)
    assert torchleaf.state_dict(model, state)["running_var"].tolist() == [1, 1, 1]


FOREIGN = {
    "other size": lambda: make(nn.BatchNorm1d(5))[1],
    "other buffers": lambda: make(MovingAverage(3, UPDATES["in-place"]))[1],
    "another model's": lambda: eqx.nn.make_with_state(lambda: (torchleaf.TorchModule(nn.BatchNorm1d(3)),))()[1],
    "Equinox's": lambda: eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")[1],
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("use", ["call", "state_dict"])
def test_state_of_another_model_is_refused(foreign, use):
    model, _ = make(nn.BatchNorm1d(3))
    state = foreign()
    with pytest.raises(torchleaf.StateError, match="`state` holds no buffers of this model"):
        model(jnp.ones((4, 3)), state=state) if use == "call" else torchleaf.state_dict(model, state)


class Grows(nn.Module):
    def __init__(self, change):
        super().__init__()
        self._change = change
        self.register_buffer("cache", torch.zeros(1, 3))

    def forward(self, x):
        self.cache = self._change(self.cache, x)
        return x


RESHAPED = {
    "longer": (lambda cache, x: torch.cat([cache, x]), r"\(it: float32\[5, 3\]\)"),
    "dtype": (lambda cache, x: cache.double(), r"\(it: float64\[1, 3\]\)"),
    "none": (lambda cache, x: None, "None"),
}


@pytest.mark.parametrize(("change", "given"), RESHAPED.values(), ids=RESHAPED)
def test_state_must_keep_its_shape_and_dtype(change, given):
    model, state = make(Grows(change))
    with pytest.raises(torchleaf.StateError, match=rf"replaces `cache` .* by {given}.*final size, and write into it"):
        model(jnp.ones((4, 3)), state=state)


def test_buffers_that_do_not_exist_yet():
    """`register_buffer(name, None)`, filled by the forward: there is no place for it in the state."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", None)

        def forward(self, x):
            self.cache = x.clone()
            return x

    with pytest.raises(torchleaf.StateError, match="`cache`"):
        torchleaf.TorchModule(Late())(jnp.ones(3))


def test_a_forward_with_a_parameter_named_state():
    """It gets what is no eqx.nn.State, as recurrent modules expect."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, state=None):
            return self.norm(x) + (0 if state is None else state)

    module, x = Recurrent(), torch.randn(4, 3)
    model, state = make(module)
    y, state = model(from_torch(x), jnp.ones(3), state)
    assert_trees_close(y, from_torch(module(x, torch.ones(3))))
    plain = torchleaf.TorchModule(copy.deepcopy(module).eval())
    assert_trees_close(plain(from_torch(x), state=jnp.ones(3)), from_torch(module.eval()(x, torch.ones(3))))
