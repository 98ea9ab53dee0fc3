"""Hooks on gradients, and other backward passes that no op shows: values are torch's, derivatives are refused."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from reentering_layers import REENTERING
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.all_cases


class _Hooked(nn.Module):
    """A hook on what is computed, where it can be."""

    def forward(self, x):
        y = x.tanh()
        if y.requires_grad:
            y.register_hook(lambda grad: 0.5 * grad)
        return y


def _with(register):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    register(module)
    return module


MODULES = {
    "of a parameter": lambda: _with(lambda m: m[0].weight.register_hook(lambda grad: grad * 2)),
    "of a tensor": lambda: nn.Sequential(nn.Linear(3, 3), _Hooked()),
    "of a tensor without parameters": _Hooked,
    "full backward hook": lambda: _with(lambda m: m[1].register_full_backward_hook(lambda m, i, o: (2 * i[0],))),
    "full backward pre-hook": lambda: _with(lambda m: m[1].register_full_backward_pre_hook(lambda m, o: (2 * o[0],))),
    "forward hook that hooks its output": lambda: _with(
        lambda m: m[1].register_forward_hook(lambda m, i, y: y.requires_grad and y.register_hook(lambda g: 2 * g) and y)
    ),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_values_are_torchs_and_derivatives_are_refused(make):
    module, x = make(), torch.randn(4, 3)
    model = torchleaf.TorchModule(module, engine="xla")
    assert_trees_close(model(from_torch(x)), from_torch(module(x)), rtol=1e-5)
    with pytest.raises(torchleaf.TorchCallError, match=r"registers hooks on gradients.*Use engine='torch'"):
        jax.grad(lambda x: jnp.sum(model(x)))(from_torch(x))


def test_code_that_asks_and_registers_none_is_differentiated():
    class Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.weight.requires_grad else super().forward(x.clone())

    module, x = Asking(3, 2), torch.randn(4, 3, requires_grad=True)
    model = torchleaf.TorchModule(module, engine="xla")
    module(x).sin().sum().backward()
    assert_trees_close(jax.grad(lambda x: jnp.sin(model(x)).sum())(from_torch(x)), from_torch(x.grad), rtol=1e-5)


@pytest.mark.parametrize("name", ["checkpoint", "nested checkpoints", "segments"])
def test_checkpoints_have_derivatives(name):
    module, x = REENTERING[name](), torch.randn(4, 3, requires_grad=True)
    model = torchleaf.TorchModule(module, engine="xla", strict=True)
    module(x).sin().sum().backward()
    assert_trees_close(jax.grad(lambda x: jnp.sin(model(x)).sum())(from_torch(x)), from_torch(x.grad), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch's own
def test_reentrant_checkpoints_have_none():
    class Reentrant(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    module, x = Reentrant(3, 2), torch.randn(4, 3)
    model = torchleaf.TorchModule(module, engine="xla")
    assert_trees_close(model(from_torch(x)), from_torch(module(x)), rtol=1e-5)
    with pytest.raises(torchleaf.TorchCallError, match=r"use_reentrant=True.*Pass `use_reentrant=False`"):
        jax.grad(lambda x: jnp.sum(model(x)))(from_torch(x))


@pytest.mark.parametrize("name", ["recomputing", "functional", "noted in the context"])
def test_functions_that_are_given_a_module_are_refused(name):
    with pytest.raises(torchleaf.TorchCallError, match=r"hands a module with weights to torch\.autograd\.Function _"):
        torchleaf.TorchModule(REENTERING[name](), engine="xla")(jnp.ones((4, 3)))
