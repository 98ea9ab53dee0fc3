"""Tensors with values as NumPy arrays, in JAX's dtypes."""

import numpy as np
import torch

from ..values.dtypes import to_jax_dtype


def to_numpy(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """A copy of a tensor's values; integers that do not fit become the nearest that do, as masks by the largest do."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    is_native = tensor.dtype == torch.bool or tensor.is_complex()  # NumPy has these, and no bfloat16
    bits = tensor if is_native else tensor.view(getattr(torch, f"uint{8 * tensor.itemsize}"))
    array = bits.numpy().view(to_jax_dtype(tensor.dtype))
    if array.dtype != dtype and array.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = np.asarray(array.clip(limits.min, limits.max))
    return array.astype(dtype)
