"""What leads past the copy to the user's own module, or to what was computed from weights, is refused by name."""

import gc
import weakref

import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import eager_and_jit, every_framework
from torch import nn
from torchleaf import TorchCallError, TorchModule

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)
GLOBAL: dict[str, nn.Module] = {}
global_module: nn.Module = nn.Identity()


class _Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        global global_module
        global_module = self

    def forward(self, x):
        return global_module.linear(x)


class _GlobalDict(_Global):
    def forward(self, x):
        GLOBAL["net"] = GLOBAL.get("net", global_module)
        return x @ GLOBAL["net"].linear.weight


class _ClassAttribute(nn.Module):
    instances = []  # noqa: RUF012 (the point of it)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        type(self).instances = [self]

    def forward(self, x):
        return self.instances[0].linear(x)


class _Swallowing(_Global):
    """Goes on after the error, and would be constant."""

    def forward(self, x):
        try:
            return global_module.linear(x)
        except Exception:
            return x


class _Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.scaled = self.w * 2

    def forward(self, x):
        return x * self.scaled


class _ComputedInList(_Computed):
    def __init__(self):
        super().__init__()
        self.parts = nn.Identity()
        self.parts.tables = [self.w.exp(), self.w.detach() + 1]

    def forward(self, x):
        return x * self.parts.tables[0] + self.w


class _Reinterpreted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.bits = self.w.detach().view(torch.int32)

    def forward(self, x):
        return x * self.bits.view(torch.float32)


class _BackwardHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        global global_module
        global_module = self
        self.linear.register_full_backward_hook(_scale_by_global)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def _scale_by_global(part, grad_in, grad_out):
    return (grad_in[0] * global_module.linear.bias.detach(),)


def _stale_weight_norm():
    """Called past the hook that computes the weight before each forward."""
    module = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    module.forward = lambda x: nn.functional.linear(x, module[0].weight)
    return module


CASES = {
    "global": (_Global, r"weight `linear\.weight` of the module.*global `global_module` in forward.*through `self`"),
    "global dict": (_GlobalDict, r"weight `linear\.weight` of the module.*global `GLOBAL` in forward"),
    "class attribute": (_ClassAttribute, r"weight `linear\.weight`.*class attribute `instances` in forward"),
    "swallowed": (_Swallowing, r"weight `linear\.weight` of the module that was wrapped"),
    "computed": (_Computed, r"attribute `scaled`, which was computed from weight `w`.*Compute it in `forward`"),
    "computed, in a list": (_ComputedInList, r"attribute `parts\.tables`, which was computed from weight `w`"),
    "reinterpreted": (_Reinterpreted, r"attribute `bits`, which shares the memory of weight `w`"),
    "weight norm": (_stale_weight_norm, r"attribute `0\.weight`, which was computed from weight `0\.weight_[gv]`"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@every_framework
@eager_and_jit
@pytest.mark.parametrize(("make", "message"), CASES.values(), ids=CASES)
def test_refused_by_name(framework, jit, make, message):
    model = framework(make())
    for _ in range(2):
        with pytest.raises(TorchCallError, match=message):
            model.maybe_jit(lambda m, x: m(x), jit=jit)(from_torch(X))
    GLOBAL.clear()


@pytest.mark.torch_engine  # hooks on gradients
@every_framework
def test_in_the_backward_pass(framework):
    model, x = framework(_BackwardHook()), from_torch(X)
    assert model(x).shape == (2, 3)
    with pytest.raises(TorchCallError, match=r"computes with `linear\.bias` as it was"):
        model.gradients(lambda m, x: (m(x).sum(), None), x)


class _Remedied(_Global):
    def forward(self, x):
        return self.linear(x)


class _Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("scaled", (self.w * 2).detach())

    def forward(self, x):
        return x * self.scaled + self.w


@pytest.mark.parametrize("make", [_Remedied, _Constant])
def test_the_remedies_work(make):
    module = make()
    assert_trees_close(TorchModule(module)(from_torch(X)), from_torch(module(X)))


def test_another_modules_weights_are_constants():
    """A module that is no part of the one that is wrapped: torch trains none of its weights, either."""
    other = nn.Linear(3, 3)

    class Perceptual(nn.Module):
        def forward(self, x):
            return other(x)

    assert_trees_close(TorchModule(Perceptual())(from_torch(X)), from_torch(other(X)))


@pytest.mark.parametrize("make", [lambda m: m, nn.utils.parametrizations.weight_norm], ids=["plain", "parametrised"])
def test_the_original_is_not_kept_alive(make):
    module = make(nn.Linear(3, 3))
    weight, module_ref = weakref.ref(next(module.parameters())), weakref.ref(module)
    model = TorchModule(module, copy=True)
    model(jnp.ones(3))
    del module
    gc.collect()
    assert module_ref() is None
    assert weight() is None
    assert torchleaf.to_torch_module(model)(torch.ones(3)).shape == (3,)


def test_a_buffer_with_a_graph_is_refused():
    """No gradient flows to buffers, and here one would have to."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("scaled", self.w * 2)

    with pytest.raises(TypeError, match=r"buffer Scaled\.scaled has a graph: .*\.detach\(\)"):
        TorchModule(Scaled())
