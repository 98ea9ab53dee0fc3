"""What a tensor is as memory: where it lies, and whether it is nothing more."""

from typing import Any

import torch

from ..internals.memory import storage_address


def storage_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage, which is another's when it is gone. No mode sees that it is asked for."""
    return storage_address(tensor)


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a storage: sparse ones and oneDNN's do not."""
    return tensor.layout == torch.strided


def memory_key(tensor: torch.Tensor) -> Any:
    """What tells a tensor of plain memory from all others: where its elements lie."""
    return storage_of(tensor), tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is memory with a geometry: of no other class, dense, with values."""
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_dense


def fills_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor, contiguous, is all that its storage holds."""
    return tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes() and tensor.is_contiguous()
