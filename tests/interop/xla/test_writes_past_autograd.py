"""Writes that torch's autograd does not see, by `torch.no_grad`, `.data` and `detach`: who keeps which derivative."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch

pytestmark = [pytest.mark.all_cases, pytest.mark.long]


def _first_row(w):
    w[0] = w[1] * 3


WITHOUT_GRADIENTS = {
    "clamp_": lambda w: w.clamp_(-0.4, 0.4),
    "data.mul_": lambda w: w.data.mul_(0.9),
    "data.copy_": lambda w: w.data.copy_(w.data.clamp(-0.5, 0.5)),
    "a row": lambda w: w[0].add_(0.25),
    "setitem": _first_row,
    "transposed": lambda w: w.t().sub_(0.1),
    "unit rows": lambda w: w.div_(w.norm(dim=1, keepdim=True)),
    "out=": lambda w: torch.add(w, 1, out=w),
}
WITH_GRADIENTS = {
    "data.mul_": lambda w: w.data.mul_(0.9),
    "data.copy_": lambda w: w.data.copy_(w.sin()),
    "a row of data": lambda w: w.data[0].add_(0.25),
    "a row of detach": lambda w: w.detach()[0].add_(0.25),
    "transposed data": lambda w: w.data.t().sub_(0.1),
    "a row": lambda w: w[0].mul_(2),
    "transposed": lambda w: w.t().mul_(w[0, 0].clone()),
}


def _wrote(write, grad_mode):
    def fn(x, w):
        w = w * 1
        with torch.set_grad_enabled(grad_mode):
            write(w)
        return (x @ w.t()).sin().sum() + (w**3).sum()

    return fn


def _both_are_used(x, w):
    w = w * 1
    data, detached = w.data, w.detach()
    data.mul_(2)
    detached[0] = detached[0] + x[0, :3].sum()  # which autograd sees, for this tensor
    return (data * w).sum() + (detached * 3 * w).sum() + (data[0] * x[0, 0]).sum()


def _a_view_of_a_detached_one_is_used(x, w):
    w = w * 1
    detached = w.detach()
    row = detached[1]
    detached.mul_(2)
    return (row * w[0]).sum() + (row * row).sum() + w.sum() * x.sum()


FUNCTIONS = {
    **{f"{name}, no_grad": _wrote(write, False) for name, write in WITHOUT_GRADIENTS.items()},
    **{name: _wrote(write, True) for name, write in WITH_GRADIENTS.items()},
    "both are used": _both_are_used,
    "a view of a detached one": _a_view_of_a_detached_one_is_used,
}


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
def test_values_and_gradients_are_torchs(fn):
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    ours = torchleaf.torch_function(fn, engine="xla", strict=True)
    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(from_torch(x), from_torch(w))
    expected = fn(x, w)
    expected.backward()
    assert_trees_close((value, grads), from_torch((expected, (x.grad, w.grad))), rtol=1e-4, atol=1e-5)


def test_the_weight_of_a_layer_that_writes_into_it():
    class Clipped(torch.nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.data.copy_(self.weight.data.clamp(-0.2, 0.2))
            return super().forward(x)

    module, twin, x = Clipped(3, 2), torch.nn.Linear(3, 2), torch.randn(4, 3)
    model = torchleaf.TorchModule(module, engine="xla")
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        twin.weight.clamp_(-0.2, 0.2)
    (twin(x) ** 2).sum().backward()
    grads = eqx.filter_grad(lambda model: jnp.sum(model(from_torch(x)) ** 2))(model)
    assert_trees_close(grads.params, from_torch({n: p.grad for n, p in twin.named_parameters()}), rtol=1e-4)
