"""Handles: how a compiled program passes on what lies on torch's side, by number.

A number travels as two int32, because JAX has 64-bit integers only where they were enabled. Its bits are read and
written past torch, whose own ways take several microseconds. 0 stands for nothing: JAX fills residuals of untaken
branches with zeros.

On a GPU a handle cannot be read without waiting for all work before it. There its place stands for it: the number is
looked up by the address that the forward call wrote it to. Whether a handle can have been copied meanwhile follows from
the program (`handle_flow.py`); an array's place is its own as long as it lives.
"""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from ..types import Aval

HANDLE = Aval((2,), np.dtype(np.int32))


BY_PLACE = {"cuda"}
"""Platforms on which the place of a handle stands for it."""

Place = tuple[int, int]
"""A device and an address in its memory."""

_number_at: dict[Place, int] = {}


def handle_of(number: int) -> torch.Tensor:
    """A handle to be read: int32[2]."""
    handle = torch.empty(HANDLE.shape, dtype=torch.int32, device="cpu")
    _words(handle).value = number
    return handle


def number_in(handle: torch.Tensor) -> int:
    """The number of a handle that `handle_of` made."""
    return _words(handle).value


def write_handle(handle: torch.Tensor, number: int) -> int:
    """Put another number into a handle; the one of a handle that was in its place, or 0."""
    if handle.device.type not in BY_PLACE:
        _words(handle).value = number
        return 0
    before = _number_at.get(_place(handle), 0)
    _number_at[_place(handle)] = number
    return before


def number_of(handle: torch.Tensor) -> int:
    """The number of a handle."""
    if handle.device.type not in BY_PLACE:
        return _words(handle).value
    return _number_at.get(_place(handle), 0)


def sign(handle: torch.Tensor) -> None:
    """Write its number into a handle on a GPU, for `is_signed`."""
    handle.view(torch.int64).fill_(number_of(handle))


def is_signed(handle: torch.Tensor) -> bool:
    """Whether a handle on a GPU holds the number that its place stands for. Waits for all work before."""
    return handle.view(torch.int64).item() == number_of(handle) != 0


def when_dropped(handle: jax.Array, drop: Callable[[int], object]) -> None:
    """Call `drop` with the number of a handle, one for each device, when the array that it is dies."""
    alone = len(handle.devices()) == 1
    for part in [handle] if alone else [shard.data for shard in handle.addressable_shards]:
        device = next(iter(part.devices()))
        if ("cpu" if device.platform == "cpu" else "cuda") not in BY_PLACE:
            weakref.finalize(handle, drop, int(np.asarray(part).view(np.int64)[0])).atexit = False
        else:
            place = (_index(device), part.unsafe_buffer_pointer())
            weakref.finalize(handle, lambda place=place: drop(_number_at.get(place, 0))).atexit = False


def _words(handle: torch.Tensor) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(handle.data_ptr())


def _place(handle: torch.Tensor) -> Place:
    return handle.get_device(), handle.data_ptr()


def _index(device: Any) -> int:
    """As torch numbers devices."""
    return -1 if device.platform == "cpu" else device.local_hardware_id
