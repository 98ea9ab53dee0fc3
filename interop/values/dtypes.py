"""Which torch dtype stands for which JAX dtype, and what JAX makes of torch's 64-bit ones."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_TORCH_TO_JAX: dict[torch.dtype, np.dtype] = {
    torch.bool: jnp.dtype(bool),
    torch.int8: jnp.dtype(jnp.int8),
    torch.int16: jnp.dtype(jnp.int16),
    torch.int32: jnp.dtype(jnp.int32),
    torch.int64: jnp.dtype(jnp.int64),
    torch.uint8: jnp.dtype(jnp.uint8),
    torch.uint16: jnp.dtype(jnp.uint16),
    torch.uint32: jnp.dtype(jnp.uint32),
    torch.uint64: jnp.dtype(jnp.uint64),
    torch.float16: jnp.dtype(jnp.float16),
    torch.bfloat16: jnp.dtype(jnp.bfloat16),
    torch.float32: jnp.dtype(jnp.float32),
    torch.float64: jnp.dtype(jnp.float64),
    torch.complex64: jnp.dtype(jnp.complex64),
    torch.complex128: jnp.dtype(jnp.complex128),
    torch.float8_e4m3fn: jnp.dtype(jnp.float8_e4m3fn),
    torch.float8_e5m2: jnp.dtype(jnp.float8_e5m2),
    torch.float8_e4m3fnuz: jnp.dtype(jnp.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: jnp.dtype(jnp.float8_e5m2fnuz),
    torch.float8_e8m0fnu: jnp.dtype(jnp.float8_e8m0fnu),
}
_JAX_TO_TORCH = {ours: theirs for theirs, ours in _TORCH_TO_JAX.items()}


def to_jax_dtype(dtype: torch.dtype) -> np.dtype:
    """The JAX dtype of the same bits, before JAX's canonicalisation; `TypeError` if there is none."""
    try:
        return _TORCH_TO_JAX[dtype]
    except KeyError:
        raise TypeError(
            f"{dtype} has no JAX counterpart; convert the tensor first, e.g. with "
            "`.dequantize()` or `.to(torch.float32)`."
        ) from None


def is_inexact_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def precision_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the least precise real number among tensors; 8 if there is none."""
    return min((x.itemsize // (1 + x.is_complex()) for x in tensors if is_inexact_tensor(x)), default=8)


def has_torch_dtype(dtype: Any) -> bool:
    """Whether torch has the dtype."""
    return dtype in _JAX_TO_TORCH


def to_torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of the same bits; `TypeError` if there is none."""
    try:
        return _JAX_TO_TORCH[dtype]
    except KeyError:
        raise TypeError(
            f"JAX dtype {dtype} has no torch counterpart; convert the array first with `.astype(...)`, "
            "or, for a typed PRNG key, with `jax.random.key_data(...)`."
        ) from None


def canonical(dtype: torch.dtype) -> np.dtype:
    """The JAX dtype an output of torch dtype `dtype` gets: 64-bit only under `jax_enable_x64`."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(to_jax_dtype(dtype)))


def operand_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype a torch callable sees for a JAX operand.

    JAX's default integer stands for torch's default integer: without x64 a JAX program
    has no int64, and torch wants one for labels and indices.
    """
    if dtype == jnp.int32 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return torch.int64
    return to_torch_dtype(dtype)


def is_inexact(dtype: Any) -> bool:
    """Whether values of this dtype carry tangents."""
    return jnp.issubdtype(dtype, jnp.inexact)
