"""A torch callable over flat tensors, before it is known what it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Flat = Callable[..., tuple[Any, Sequence[Any]]]
"""A function of flat tensors: its output, any pytree, and what its state operands are after it."""


@dataclass(frozen=True)
class Traceable:
    """The callable, and what it is called with."""

    function: Flat
    name: str
    operand_names: Sequence[str]
    specs: Sequence[tuple[tuple[int, ...], torch.dtype]]
    """Shapes and torch dtypes of the operands."""
    device: torch.device
    """Where they lie."""
    state_operands: tuple[int, ...]
    """Operands whose values after the call the function returns beside its output."""
    explores: bool
    """Whether it matters which state operands it changes for other values than its arguments'."""
    has_key: bool
    """Whether random ops have a key to draw from."""
    key_remedy: str
    """What to do where they have none."""
    trainable: tuple[int, ...] = ()
    """Operands that are parameters of a module, which require gradients in torch."""
    foreign: Mapping[int, str] = field(default_factory=dict)
    """Storages that no op may read, because operands stand for what they hold; each with what it is."""
