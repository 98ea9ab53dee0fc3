"""Fourier transforms, by the three ops that all of torch.fft is made of."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ..table import op


def _scale(shape: Sequence[int], dims: Sequence[int], normalization: int) -> float:
    count = math.prod(shape[d] for d in dims)
    return (1.0, 1 / math.sqrt(count), 1 / count)[normalization]


@op("_fft_c2c")
def complex_to_complex(x: Any, dim: Sequence[int], normalization: int, forward: bool) -> Any:
    """Of complex numbers."""
    if not len(dim):
        return x
    if forward:
        return jnp.fft.fftn(x, axes=tuple(dim)) * _scale(x.shape, dim, normalization)
    return jnp.fft.ifftn(x, axes=tuple(dim), norm="forward") * _scale(x.shape, dim, normalization)


@op("_fft_r2c")
def real_to_complex(x: Any, dim: Sequence[int], normalization: int, onesided: bool) -> Any:
    """Of real numbers; the last axis named is halved."""
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    return transform(x, axes=tuple(dim)) * _scale(x.shape, dim, normalization)


@op("_fft_c2r")
def complex_to_real(x: Any, dim: Sequence[int], normalization: int, last_dim_size: int, *, out: Any) -> Any:
    """Backwards, to real numbers."""
    sizes = [out.shape[d] for d in dim]
    result = jnp.fft.irfftn(x, s=sizes, axes=tuple(dim), norm="forward")
    return result * _scale(out.shape, dim, normalization)
