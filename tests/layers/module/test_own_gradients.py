"""Modules that differentiate by their own weights, or ask whether they could: as in torch, in every transform."""

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch, repeated_jit
from frameworks import every_framework
from module_reference import torch_gradients_of, weighted_sum
from torch import nn
from torchleaf import TorchModule

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 12).reshape(4, 3)


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("shift", torch.rand(3))

    def energy(self, x):
        return (torch.tanh(self.linear(x) * self.frozen + self.shift) ** 2).sum()


class Penalty(_Base):
    def forward(self, x):
        (grad,) = torch.autograd.grad(self.energy(x), self.linear.weight, create_graph=True)
        return (grad**2).sum()


class PenaltyByAll(_Base):
    def forward(self, x):
        params = [p for p in self.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.energy(x), params, create_graph=True)
        return sum((g**2).sum() for g in grads) * x


class InnerStep(_Base):
    """As in meta-learning."""

    def forward(self, x):
        weight, bias = torch.autograd.grad(self.energy(x), tuple(self.linear.parameters()), create_graph=True)
        return nn.functional.linear(x, self.linear.weight - 0.5 * weight, self.linear.bias - 0.5 * bias)


class ByInputs(_Base):
    """As forces in molecular dynamics; this one needs no weights that require gradients."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x), x, create_graph=True)
        return -force


class ByBoth(_Base):
    def forward(self, x):
        y = x.detach().requires_grad_()
        force, grad = torch.autograd.grad(self.energy(y), (y, self.linear.bias), create_graph=True)
        return force * grad * x


class Asking(_Base):
    def forward(self, x):
        x = x * 2 if self.linear.weight.requires_grad else x
        return self.linear(x) * 3 if self.frozen.requires_grad else self.linear(x)


class AskingOfResults(_Base):
    def forward(self, x):
        y = self.linear(x)
        return torch.sin(y) if y.requires_grad else y


class GradAttribute(_Base):
    """Test-time training by `.backward()`."""

    def forward(self, x):
        weight = self.linear.weight.detach().requires_grad_()
        (nn.functional.linear(x.detach(), weight) ** 2).sum().backward()
        return nn.functional.linear(x, self.linear.weight - 0.1 * weight.grad)


MODULES = [Penalty, PenaltyByAll, InnerStep, ByInputs, ByBoth, Asking, AskingOfResults, GradAttribute]
every_module = pytest.mark.parametrize("make", MODULES, ids=lambda cls: cls.__name__)


@every_module
@every_framework
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_values_and_gradients(framework, make, residuals):
    module, x = make(), from_torch(X)
    model = framework(module, residuals=residuals)
    expected = from_torch(module(X).detach())
    assert_trees_close(model(x), expected)
    for _ in range(3):
        assert_trees_close(model.jit(lambda m, x: m(x))(x), expected)
    gradients = model.gradients(lambda m, x: (weighted_sum(m(x)), None), x)
    weights, (inputs,) = torch_gradients_of(module, module, (X,), {})
    assert_trees_close(gradients.weights.params, weights)
    assert_trees_close(gradients.inputs[0], inputs)


@every_module
def test_compiled_gradients_by_inputs(make):
    """Where JAX differentiates by no weight, torch's code can."""
    module, x = make(), from_torch(X)
    model = TorchModule(module)
    _, (inputs,) = torch_gradients_of(module, module, (X,), {})
    assert_trees_close(repeated_jit(jax.grad(lambda x: weighted_sum(model(x))))(x), inputs)


@every_module
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
def test_vmap_and_forward_mode(make):
    module, x = make(), from_torch(X)[:, None]
    model = TorchModule(module)
    assert_trees_close(jax.vmap(model)(x), jnp.stack([model(row) for row in x]))
    _, tangent = jax.jvp(model, (x[0],), (jnp.cos(x[0]),))
    _, pullback = jax.vjp(model, x[0])
    (transposed,) = pullback(jnp.sin(1 + tangent))
    assert_trees_close((tangent * jnp.sin(1 + tangent)).sum(), (jnp.cos(x[0]) * transposed).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("make", [Penalty, InnerStep], ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
def test_second_derivatives(make, x64):
    module = make().double()
    model, x = TorchModule(module), X[:1].double()
    expected = torch.autograd.functional.hessian(lambda x: (module(x) ** 2).sum(), x)
    assert_trees_close(jax.hessian(lambda x: (model(x) ** 2).sum())(from_torch(x)), from_torch(expected))


class _AskingInVain(_Base):
    def forward(self, x):
        if self.linear.weight.requires_grad:
            pass
        return self.linear(x)


def test_asking_alone_costs_nothing():
    """It makes no difference, so vmap runs as a whole, without the warning."""
    model, x = TorchModule(_AskingInVain()), from_torch(X)
    assert_trees_close(jax.vmap(model)(x), model(x))
