"""The arrays that tensors on the CPU are to JAX: each made once, and kept for as long as its tensor is there.

A new one costs as much as a small program. Nobody but programs sees these arrays, which read the tensor's memory
whenever they run, so that what torch writes there in the meantime is what they see.
"""

import atexit
import weakref
from typing import Any

import jax
import torch

from ..internals.jax import view_as_array, view_as_tensor


class _View:
    """An array, and what its tensor was then: torch can give a tensor other memory, another shape and dtype."""

    __slots__ = ("address", "array", "dtype", "shape", "tensor")

    def __init__(self, tensor: torch.Tensor, array: jax.Array):
        self.array, self.address, self.dtype, self.shape = array, tensor.data_ptr(), tensor.dtype, tensor.shape
        key = id(tensor)
        self.tensor = weakref.ref(tensor, lambda gone: _forget(key, gone))

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is what its tensor is now."""
        return self.address == tensor.data_ptr() and self.shape == tensor.shape and self.dtype == tensor.dtype


_views: dict[int, _View] = {}
atexit.register(_views.clear)  # before JAX goes


def _forget(key: int, gone: Any) -> None:
    found = _views.get(key)
    if found is not None and found.tensor is gone:
        del _views[key]


def as_array(tensor: torch.Tensor, device: Any) -> jax.Array:
    """A dense, contiguous tensor on the CPU as an array of the user's programs."""
    view = _views.get(id(tensor))
    if view is not None and view.tensor() is tensor and view.is_of(tensor):
        return view.array
    array = view_as_array(tensor.detach(), device)  # which would keep the tensor itself for as long as it is there
    _views[id(tensor)] = _View(tensor, array)
    return array


def as_tensor(array: jax.Array) -> torch.Tensor:
    """An array that a program on the CPU made, as a tensor, which is that array again wherever JAX gets it."""
    tensor = view_as_tensor(array)
    _views[id(tensor)] = _View(tensor, array)
    return tensor
