"""A module as its users build it, with arguments to call it with."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Specimen:
    """What to build, what to call it with, and what not to ask of it.

    **Attributes:**

    - `name`: names it in tests and tables.
    - `build`: makes the module; the same one whenever the generators are seeded alike.
    - `args`: makes positional arguments, with other values (and the same shapes) each time; tensors in any pytree.
    - `output`: picks what is compared from what the module returns.
    - `batched`: whether `vmap` maps over a tensor among the arguments; those of floats unless given.
    - `training`: whether it is called in training mode, where it must not draw random numbers.
    - `random`: whether it draws random numbers in training mode.
    - `smooth`: whether finite differences in float64 tell its second derivatives: not where it rounds or detaches, or
      computes in float32 whatever it is given; then torch's own double backward tells them.
    - `not_asked`: checks that do not apply, each with the reason.
    """

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    output: Callable[[Any], Any] = lambda y: y
    batched: Callable[[torch.Tensor], bool] = torch.is_floating_point
    training: bool = False
    random: bool = False
    smooth: bool = True
    not_asked: Mapping[str, str] = field(default_factory=dict)

    def module(self, *, training: bool | None = None, double: bool = False) -> nn.Module:
        """The module, with the same weights each time."""
        seed(0)
        module = self.build().train(self.training if training is None else training)
        return module._apply(widened) if double else module

    def arguments(self, number: int, *, double: bool = False) -> tuple[Any, ...]:
        """The arguments of one call of many."""
        seed(100 + number)
        args = self.args()
        return map_tensors(widened, args) if double else args


def seed(number: int) -> None:
    """Seed every generator that packages draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def widened(x: torch.Tensor) -> torch.Tensor:
    """A tensor in 64-bit floats, complex ones too (`Module.double` leaves those as they are)."""
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """A pytree of tuples, lists and dicts with `function` applied to its tensors."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, function, tree)
