"""The transforms of torch.func that are running, and what they wrap."""

from typing import Any

import torch
from torch._functorch import pyfunctorch as _pyfunctorch

_C: Any = torch._C
_functorch: Any = _C._functorch


def transforms() -> list[Any]:
    """The transforms of torch.func that are running, the outermost first; empty on plain values."""
    return _pyfunctorch.retrieve_all_functorch_interpreters()


JVP_TRANSFORM, VMAP_TRANSFORM = _pyfunctorch.JvpInterpreter, _pyfunctorch.VmapInterpreter
"""Their classes."""


def without_transforms() -> Any:
    """Within it none is running, so that values can be looked at."""
    return _pyfunctorch.temporarily_clear_interpreter_stack()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch in a `torch.func.vmap`."""
    return _functorch.is_batchedtensor(tensor)


def batch_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The level of the vmap that a batch belongs to, and its axis."""
    return _functorch.maybe_get_level(tensor), _functorch.maybe_get_bdim(tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func has wrapped a tensor."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """What is in the wrapper."""
    return _functorch.get_unwrapped(tensor)


def innermost_transform() -> Any:
    """The kind of the innermost transform that is running, or None; quicker than `transforms`."""
    interpreter = _functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


TRANSFORM = _functorch.TransformType
"""The kinds: Grad, Jvp, Vmap, Functionalize."""


def has_tangents(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor is a dual number of `torch.autograd.forward_ad`."""
    level = torch.autograd.forward_ad._current_level
    return level >= 0 and not is_grads_batch(tensor) and torch._VF._unpack_dual(tensor, level=level)[1] is not None


def is_grads_batch(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch of `torch.autograd.grad(is_grads_batched=True)`, which is no vmap of torch.func."""
    return _functorch.is_legacy_batchedtensor(tensor)


def grads_batch_level(batch: torch.Tensor) -> int:
    """The innermost level of such a batch, also in autograd's own threads, which know nothing of levels."""
    return next(level for level in range(_MOST_LEVELS, 0, -1) if _has_level(batch, level))


_MOST_LEVELS = 64


def _has_level(batch: torch.Tensor, level: int) -> bool:
    """Without it torch expands what it is given, to size 0 here."""
    return _C._VariableFunctions._remove_batch_dim(batch, level, 0, 0).shape[0] != 0


def grads_of_batch(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """What is in such a batch, its batch axis in front; a size that is not the batch's is never looked at."""
    return _C._VariableFunctions._remove_batch_dim(tensor, level, 1, 0)


def batch_of_grads(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """A tensor as such a batch over its first axis."""
    return _C._VariableFunctions._add_batch_dim(tensor, 0, level)
