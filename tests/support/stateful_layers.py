"""Torch modules that change their buffers while they train: one for each way users write state."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import ResNet18
from module_reference import weighted_sum
from torch import nn
from torch.nn.utils import parametrizations


class MovingAverage(nn.Module):
    """Subtracts an exponential moving average of its inputs, updated by `update(module, new average)`."""

    average: torch.Tensor

    def __init__(self, features: int, update: Callable[[nn.Module, torch.Tensor], object]):
        super().__init__()
        self.scale, self._update = nn.Parameter(torch.randn(features)), update
        self.register_buffer("average", torch.randn(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self._update(self, 0.9 * self.average + 0.1 * x.mean(tuple(range(x.ndim - 1))))
        return self.scale * (x - self.average)


UPDATES: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "in-place": lambda module, new: module.average.copy_(new),
    "data": lambda module, new: module.average.data.mul_(0).add_(new),
    "set-data": lambda module, new: setattr(module.average, "data", new),
    "reassigned": lambda module, new: setattr(module, "average", new),
    "registered-again": lambda module, new: module.register_buffer("average", new),
    "view": lambda module, new: module.average.view(-1)[:].copy_(new),
}


class Counters(nn.Module):
    """Buffers of other dtypes than float32, each updated in its own way."""

    def __init__(self, features: int, wide: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.zeros(features, dtype=torch.uint8))
        self.register_buffer("seen", torch.zeros(features, dtype=torch.bool))
        self.register_buffer("mean16", torch.zeros(features, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("last", torch.zeros(2, dtype=torch.int32))
        if wide:
            self.register_buffer("total", torch.zeros(features, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * self.weight + self.calls * self.seen
        self.calls += 1
        self.level.add_(100)  # it wraps around
        self.seen |= (x > 1).any(0)
        self.mean16.add_(x.mean(0).detach())
        self.last = torch.stack([self.last[1], self.calls.int()])
        if hasattr(self, "total"):
            self.total += x.detach().double().sum(0)
        return y, self.calls


class Cache(nn.Module):
    """A cache of keys and values written slice by slice, as for generation, and read back whole."""

    def __init__(self, features: int, size: int):
        super().__init__()
        self.project = nn.Linear(features, 2 * features)
        self.register_buffer("keys", torch.zeros(size, features))
        self.register_buffer("values", torch.zeros(size, features))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, value = self.project(x).detach().chunk(2, -1)
        self.keys.index_copy_(0, self.position, key[:1])
        self.values[:1] = value[:1]
        self.values = self.values.roll(1, 0)
        self.position += 1
        return torch.softmax(x @ self.keys.T, -1) @ self.values + self.project(x).sum(-1, keepdim=True)


class CountsPositive(nn.Module):
    """Inspects its input, so that it cannot be traced: it changes its state depending on values."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            self.count += 1
        return self.weight * x


def _spectral_norm_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(nn.Linear(3, 4))


@dataclass(frozen=True)
class Stateful:
    """A module that changes buffers, and how to call it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6, 3)
    """Of its input."""
    reads_values: bool = False
    """Whether it cannot be traced, so that a change of state is noticed when it runs."""

    def inputs(self, steps: int) -> list[torch.Tensor]:
        """What it is called on, differing from step to step."""
        return [(1 + i) * torch.randn(self.shape) + i for i in range(steps)]


STATEFUL = {
    "BatchNorm1d": Stateful(lambda: nn.BatchNorm1d(3)),
    "BatchNorm1d-cumulative": Stateful(lambda: nn.BatchNorm1d(3, momentum=None), reads_values=True),
    "BatchNorm1d-plain": Stateful(lambda: nn.BatchNorm1d(3, affine=False)),
    "BatchNorm2d": Stateful(lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
    "InstanceNorm2d": Stateful(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 2)),
    "spectral_norm": Stateful(lambda: parametrizations.spectral_norm(nn.Linear(3, 4))),
    "spectral_norm-hook": Stateful(_spectral_norm_hook),
    **{
        f"MovingAverage-{name}": Stateful(lambda update=update: MovingAverage(3, update))
        for name, update in UPDATES.items()
    },
    "Counters": Stateful(lambda: Counters(3)),
    "Cache": Stateful(lambda: Cache(3, 8)),
    "ResNet18": Stateful(lambda: ResNet18(width=2), (4, 3, 16, 16)),
    "nested": Stateful(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), MovingAverage(4, UPDATES["in-place"])))
    ),
}

each = pytest.mark.parametrize("spec", STATEFUL.values(), ids=STATEFUL)
_FEW = ("BatchNorm2d", "spectral_norm", "Cache", "nested")
some = pytest.mark.parametrize("spec", [STATEFUL[name] for name in _FEW], ids=_FEW)


def make(module, **options):
    return eqx.nn.make_with_state(lambda: torchleaf.TorchModule(module, **options))()


def buffers_of(module):
    return {name: from_torch(tensor) for name, tensor in module.named_buffers()}


def by_torch(module, inputs):
    """torch's outputs step by step, and its buffers after all of them."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        outputs = [from_torch(module(x.clone())) for x in inputs]
    return outputs, buffers_of(module)


def loss_and_state(model, x, state):
    """For `jax.value_and_grad(..., has_aux=True)`."""
    y, state = model(x, state=state)
    return weighted_sum(y), state


def assert_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)


def assert_as_torch(engine: str, actual, expected):
    """Bit for bit where torch computes."""
    tolerance = 0 if engine == "torch" else 1e-5
    assert_trees_close(actual, expected, rtol=tolerance, atol=tolerance)
