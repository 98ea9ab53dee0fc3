"""A tensor of every dtype, and the bytes of arrays and tensors, read without torchleaf's help."""

import jax
import numpy as np
import torch

NARROW = (
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
"""The dtypes JAX has without x64."""

WIDE = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}
"""The dtypes JAX has with x64 only, and what becomes of them without."""

ALL = (*NARROW, *WIDE)


def dtype_id(dtype: torch.dtype) -> str:
    """For `pytest.mark.parametrize(ids=)`."""
    return str(dtype).removeprefix("torch.")


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    """A tensor with values that differ from each other as far as the dtype allows, and use its range."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        values = torch.arange(count) % 3 == 0
    elif dtype == torch.float8_e8m0fnu:  # powers of two
        values = 2.0 ** (torch.arange(count) % 7 - 3)
    elif dtype.is_complex:
        values = torch.complex(torch.arange(count) - 2.5, 3.25 - torch.arange(count))
    elif dtype.is_floating_point:
        values = torch.arange(count) % 6 / 4 - 0.5
    elif dtype.is_signed:
        values = torch.arange(count) % 200 - 100
    else:
        values = torch.arange(count) % 200 + 50
    return values.to(dtype).reshape(shape)


def raw_bytes(x: jax.Array | np.ndarray | torch.Tensor) -> bytes:
    """The values in row-major order, as bytes."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg().reshape(-1)
        return x.view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return np.asarray(x).tobytes()


def as_torch(x: jax.Array) -> torch.Tensor:
    """A tensor of the same values in memory of its own, for dtypes NumPy has."""
    return torch.from_numpy(np.array(x)).to(torch.get_default_device())
