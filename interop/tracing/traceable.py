"""A torch callable over flat tensors, before it is known what it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..types import Operand

Flat = Callable[..., tuple[Any, Sequence[Any]]]
"""A function of flat tensors: its output, any pytree, and what its state operands are after it."""


@dataclass(frozen=True)
class Traceable:
    """The callable, and what it is called with."""

    function: Flat
    name: str
    operands: Sequence[Operand]
    device: torch.device
    """Where they lie."""
    explores: bool
    """Whether it matters which state operands it changes for other values than its arguments'."""
    has_key: bool
    """Whether random ops have a key to draw from, the last operand."""
    key_remedy: str
    """What to do where they have none."""
    foreign: Mapping[int, str] = field(default_factory=dict)
    """Storages that no op may read, because operands stand for what they hold; each with what it is."""

    def without_key(self) -> "Traceable":
        """The same without the last operand."""
        return replace(self, operands=self.operands[:-1])

    @property
    def specs(self) -> list[tuple[tuple[Any, ...], torch.dtype]]:
        """Shapes and torch dtypes of the operands."""
        return [(tuple(x.aval.shape), x.dtype) for x in self.operands]

    @property
    def state_operands(self) -> tuple[int, ...]:
        """Operands whose values after the call the function returns beside its output."""
        return tuple(i for i, x in enumerate(self.operands) if x.is_state)

    @property
    def trainable(self) -> tuple[int, ...]:
        """Operands that are parameters of a module."""
        return tuple(i for i, x in enumerate(self.operands) if x.is_trainable)
