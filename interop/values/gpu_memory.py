"""Of which kind the memory is that JAX and torch hand out on a GPU.

CUDA has two: one piece from `cuMemAlloc`, or pages that are mapped (`cuMemMap`), which XLA's allocators take, and
torch's with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`. A program that XLA has captured as a graph, as it does
with most, takes other addresses the next time, but in its copies no memory of the other kind: it fails with
"CUDA error: Failed to set memcpy D2D node params". A training loop meets both: weights of torch's first, then its own.

Source: [cuGraphExecMemcpyNodeSetParams](https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html),
[cuPointerGetAttribute](https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__UNIFIED.html).
"""

import ctypes
import functools
from typing import Any

import jax
import numpy as np

_IS_ONE_PIECE = 10  # CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE


def is_as_xlas(array: jax.Array) -> bool:
    """Whether a view of torch's memory on a GPU lies in memory of the kind that XLA takes on this device."""
    (device,) = array.devices()
    return array.size == 0 or _is_one_piece(array) == _is_one_piece_of_xlas(device)


@functools.cache
def _is_one_piece_of_xlas(device: Any) -> bool | None:
    return _is_one_piece(jax.device_put(np.zeros(1, np.float32), device))


def _is_one_piece(array: jax.Array) -> bool | None:
    """None for memory that the driver does not know."""
    value, address = ctypes.c_uint64(0), ctypes.c_uint64(array.unsafe_buffer_pointer())
    code = _driver().cuPointerGetAttribute(ctypes.byref(value), _IS_ONE_PIECE, address)
    return None if code else bool(value.value)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
