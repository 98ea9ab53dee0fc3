"""Weights of double precision where JAX has none: leaves in single precision, computations as torch does them."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import eager_and_jit, every_framework
from module_reference import torch_gradients_of, weighted_sum
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)


class _Buffer(nn.Module):
    """As a flow's base distribution has one; everything else is of single precision."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("log_z", torch.tensor(0.1 + 1e-9, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) - self.log_z


class _Parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x).double() * self.scale


class _Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x):
        return x @ self.w.real, torch.fft.fft(x @ self.w.imag)


class _Average(nn.Module):
    """State of double precision."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x * self.w + self.mean


class _Precise(nn.Module):
    """Sums in which single precision would lose everything."""

    def __init__(self):
        super().__init__()
        self.register_buffer("large", torch.tensor(2.0**26, dtype=torch.float64))

    def forward(self, x):
        return (x + self.large) - self.large


def _whole():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).double()


MODULES = {  # what the warning names, and the dtype in which torch gets the input
    "buffer": (_Buffer, "`log_z`", torch.float32),
    "parameter": (_Parameter, "`scale`", torch.float32),
    "whole": (_whole, "and 4 more", torch.float64),
    "complex": (_Complex, "`w`", torch.float64),
    "average": (_Average, "`mean`", torch.float32),
    "precise": (_Precise, "`large`", torch.float64),
}
every_module = pytest.mark.parametrize(("make", "named", "dtype"), MODULES.values(), ids=MODULES)


@every_module
@every_framework
@eager_and_jit
def test_values(framework, jit, make, named, dtype):
    module, x = make(), from_torch(X)
    with pytest.warns(UserWarning, match=rf"double precision .*{named}.*jax_enable_x64.*module\.float\(\)") as caught:
        model = framework(module, with_state=True, copy=True)
    assert len([w for w in caught if "double precision" in str(w.message)]) == 1
    assert {jnp.dtype(leaf.dtype).itemsize for leaf in model.weights.all.values()} <= {4, 8}
    call = model.maybe_jit(lambda m, x: m(x), jit=jit)
    for _ in range(4):
        assert_trees_close(call(x), from_torch(module(X.to(dtype))))


@pytest.mark.parametrize("name", ["buffer", "parameter", "whole", "complex"])
@pytest.mark.filterwarnings("ignore:TorchModule. .* double precision:UserWarning")
def test_gradients(name):
    make, _, dtype = MODULES[name]
    module, x = make(), from_torch(X)
    model = torchleaf.TorchModule(module)
    gradient = jax.jit(jax.grad(lambda p: weighted_sum(eqx.tree_at(lambda m: m.params, model, p)(x))))
    expected, _ = torch_gradients_of(module, module, (X.to(dtype),), {})
    for _ in range(3):
        assert_trees_close(gradient(model.params), expected, rtol=1e-4, atol=1e-5)


@every_framework
@pytest.mark.filterwarnings("ignore:TorchModule. .* double precision:UserWarning")
def test_back_to_torch(framework):
    module = _Parameter()
    model = framework(module)
    assert model.state_dict()["scale"].dtype == torch.float64
    assert model.to_torch().scale.dtype == torch.float64
    assert_trees_close(from_torch(model.to_torch()(X)), from_torch(module(X)))


def test_x64_needs_no_warning(x64):
    module = _Buffer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = torchleaf.TorchModule(module)
    assert model.buffers["log_z"].dtype == jnp.float64
    assert float(model.buffers["log_z"]) == 0.1 + 1e-9
