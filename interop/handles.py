"""Handles: how a compiled program passes on what lies on torch's side, by number.

A number travels as two int32, because JAX has 64-bit integers only where they were enabled. Its bits are read and
written past torch, whose own ways take several microseconds. 0 stands for nothing: JAX fills residuals of untaken
branches with zeros.
"""

import ctypes

import jax
import numpy as np
import torch

from .call import Aval

HANDLE = Aval((2,), np.dtype(np.int32))


def handle_of(number: int) -> torch.Tensor:
    """A handle: int32[2]."""
    handle = torch.empty(HANDLE.shape, dtype=torch.int32)
    write_handle(handle, number)
    return handle


def write_handle(handle: torch.Tensor, number: int) -> None:
    """Put another number into a handle."""
    ctypes.c_int64.from_address(handle.data_ptr()).value = number


def number_of(handle: torch.Tensor) -> int:
    """The number of a handle on the CPU."""
    return ctypes.c_int64.from_address(handle.data_ptr()).value


def number_of_array(handle: jax.Array) -> int:
    """The number of a handle that is a JAX array."""
    return int(np.asarray(handle).view(np.int64)[0])
