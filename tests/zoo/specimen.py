"""A module as its users build it, with arguments to call it with."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torchleaf.layers.check.subject import Subject, map_tensors, widened
from torchleaf.layers.check.wrapped import EquinoxWrapped, Wrapped


@dataclass(frozen=True)
class Specimen(Subject):
    """What to build, what to call it with, and what not to ask of it.

    **Attributes:**

    - `name`: names it in tests and tables.
    - `build`: makes the module; the same one whenever the generators are seeded alike.
    - `args`: makes positional arguments, with other values (and the same shapes) each time; tensors in any pytree.
    - `output`: picks what is compared from what the module returns.
    - `maps`: whether `vmap` maps over a tensor among the arguments; those of floats unless given.
    - `training`: whether it is called in training mode, where it must not draw random numbers.
    - `random`: whether it draws random numbers in training mode.
    - `smooth`: whether finite differences in float64 tell its second derivatives: not where it rounds or detaches, or
      computes in float32 whatever it is given; then torch's own double backward tells them.
    - `not_asked`: checks that do not apply, each with the reason.
    - `options`: those of `torchleaf.TorchModule`.
    """

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    output: Callable[[Any], Any] = lambda y: y
    maps: Callable[[torch.Tensor], bool] = torch.is_floating_point
    training: bool = False
    random: bool = False
    smooth: bool | None = None
    forward_mode: bool = True
    not_asked: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def module(self, *, double: bool = False, drawing: bool = False) -> nn.Module:
        seed(0)
        module = self.build().train(drawing or self.training)
        return module._apply(widened) if double else module

    def arguments(self, number: int, *, double: bool = False) -> tuple[Any, ...]:
        seed(100 + number)
        args = self.args()
        return map_tensors(widened, args) if double else args

    def batched(self, x: torch.Tensor) -> bool:
        return self.maps(x)

    def wrap(self, module: nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        return EquinoxWrapped(module, self.options, stateful=stateful)

    def key(self) -> jax.Array:
        return jax.random.key(0)


def seed(number: int) -> None:
    """Seed every generator that packages draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
