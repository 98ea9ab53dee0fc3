"""What every room speaks of: arrays by their shapes and dtypes, the operands of a call, and the user's options."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import torch

Aval = jax.ShapeDtypeStruct
Tensors = tuple[torch.Tensor, ...]
VmapMethod = Literal["auto", "vmap", "batched", "loop"]
Residuals = Literal["live", "recompute"]
Engine = Literal["torch", "xla"]
"""What computes a callable's ops: torch, or XLA."""
Checkpoints = Literal["none", "kept", "reentrant"]
"""Whether a callable uses `torch.utils.checkpoint`, and of which kind."""


@dataclass(frozen=True)
class Operand:
    """An array that a torch callable is called with, at one signature."""

    name: str
    """How the user wrote it."""
    aval: Aval
    dtype: torch.dtype
    """The torch dtype in which the callable gets it."""
    is_state: bool = False
    """Whether it is a buffer of a module: its value after the call is the caller's affair."""
    is_trainable: bool = False
    """Whether it is a parameter of a module, which requires gradients in torch."""


@dataclass(frozen=True)
class CallOptions:
    """How a torch callable is to be called: the options of `torchleaf.torch_function`, where they are explained.

    **Raises:** `ValueError` or `TypeError` naming an option that is none.
    """

    vmap_method: VmapMethod = "auto"
    residuals: Residuals = "live"
    forward_mode: bool = True
    replay: bool = True
    out_shape: Any = None
    example_args: Sequence[Any] | None = None
    engine: Engine = "torch"
    strict: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {_listed(allowed)}, got {getattr(self, name)!r}.")
        if self.example_args is not None and not isinstance(self.example_args, tuple | list):
            given = type(self.example_args).__name__
            raise TypeError(f"example_args must be a tuple of positional arguments, got {given}.")
        if self.strict and self.engine != "xla":
            raise ValueError("strict=True is for engine='xla': it refuses ops that torch computes, which all are here.")

    @property
    def key(self) -> Hashable:
        """What two that are alike have in common, of options that a module may have: `out_shape` is a pytree."""
        leaves, treedef = jax.tree.flatten(self.out_shape)
        shapes = tuple((getattr(x, "shape", None), str(getattr(x, "dtype", x))) for x in leaves)
        engine = (self.engine, self.strict)
        return self.vmap_method, self.residuals, self.forward_mode, self.replay, *engine, treedef, shapes


_ALLOWED = {
    "vmap_method": ("auto", "vmap", "batched", "loop"),
    "residuals": ("live", "recompute"),
    "engine": ("torch", "xla"),
    "strict": (False, True),
}


def _listed(allowed: Sequence[str]) -> str:
    return f"one of {allowed}" if len(allowed) > 2 else " or ".join(map(repr, allowed))
