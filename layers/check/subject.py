"""What is checked: a torch module or function, made anew for each check, and arguments for many calls."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch

from ...interop.values.trees import flatten_registering
from .wrapped import Wrapped


class Subject(ABC):
    """Makes what is checked, in the user's dtypes and in double precision.

    **Attributes:**

    - `name`: how tables call it.
    - `output`: picks what is compared from what the module returns.
    - `random`: whether it draws random numbers, with `drawing`.
    - `smooth`: whether finite differences in float64 tell its second derivatives: not where it rounds or detaches, or
      computes in float32 whatever it is given; None if that is to be found out.
    - `forward_mode`: whether it is to have forward mode.
    - `not_asked`: checks that do not apply, each with the reason.
    - `cannot_compare`: why its numbers cannot be compared with torch's; None if they can.
    """

    name: str
    output: Callable[[Any], Any]
    random: bool
    smooth: bool | None
    forward_mode: bool
    not_asked: Mapping[str, str]
    cannot_compare: str | None = None

    @abstractmethod
    def module(self, *, double: bool = False, drawing: bool = False) -> torch.nn.Module:
        """The module, with the same weights each time; as it draws no random numbers, unless `drawing`."""

    def reference(self, *, double: bool = False, drawing: bool = False) -> torch.nn.Module:
        """The module as torch is to run it."""
        return self.module(double=double, drawing=drawing)

    @abstractmethod
    def arguments(self, number: int, *, double: bool = False) -> tuple[Any, ...]:
        """The arguments of one call of many: tensors in any pytree, of the same shapes and with other values."""

    @abstractmethod
    def batched(self, x: torch.Tensor) -> bool:
        """Whether `vmap` maps over a tensor among the arguments."""

    @abstractmethod
    def wrap(self, module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        """The module as a framework has it, `stateful` if calls change buffers; `args` are those of a call in JAX."""

    @abstractmethod
    def key(self) -> jax.Array:
        """The key from which the keys of all calls are made."""


def widened(x: torch.Tensor) -> torch.Tensor:
    """A tensor in 64-bit floats, complex ones too (`Module.double` leaves those as they are)."""
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """A pytree with `function` applied to its tensors."""
    leaves, treedef = flatten_registering(tree)
    return jax.tree.unflatten(treedef, [function(x) if isinstance(x, torch.Tensor) else x for x in leaves])


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a pytree, in JAX's order."""
    return [x for x in flatten_registering(tree, every_record=True)[0] if isinstance(x, torch.Tensor)]


def like(noise: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Noise symmetric where `x` is a symmetric matrix: what is defined for these alone has no other derivatives."""
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or bool((x == x.flatten()[:1]).all()) or not bool((x == x.mH).all()):
        return noise
    return (noise + noise.mH) / 2
