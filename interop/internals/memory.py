"""Tensors' memory: who holds it, and how it is written."""

from collections.abc import Callable
from typing import Any

import torch

from .ops import DisableTorchFunction

_C: Any = torch._C


def _address_by_storage(tensor: torch.Tensor) -> int:
    with DisableTorchFunction():
        return tensor.untyped_storage()._cdata


storage_address: Callable[[torch.Tensor], int] = getattr(_C, "_storage_address", _address_by_storage)
"""Where a tensor's storage is; no mode sees that it is asked for."""


def storage_holders(tensor: torch.Tensor) -> int:
    """How many hold a tensor's storage: a tensor of XLA's memory that stays behind is found by it."""
    return _C._storage_Use_Count(tensor.untyped_storage()._cdata)


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors into others, in as few kernels as may be."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def throw_on_writes(tensor: torch.Tensor) -> None:
    """Make it an error to write into a tensor's memory, or to ask for it, when there is none any more."""
    _C._set_throw_on_mutable_data_ptr(tensor)
