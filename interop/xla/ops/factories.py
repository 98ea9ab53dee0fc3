"""Tensors out of nothing: they are told by their shape and dtype."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ..dtypes import cast
from ..table import op


@op(
    "zeros",
    "zeros_like",
    "new_zeros",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
    "_efficientzerotensor",
)
def zeros(*args: Any, out: Any, **options: Any) -> Any:
    """Zeros; memory that torch leaves as it is, too."""
    return jnp.zeros(out.shape, out.dtype)


@op("ones", "ones_like", "new_ones")
def ones(*args: Any, out: Any, **options: Any) -> Any:
    """Ones."""
    return jnp.ones(out.shape, out.dtype)


@op("full", "full_like", "new_full")
def full(like: Any, *args: Any, out: Any, **options: Any) -> Any:
    """One value: the last argument."""
    value = args[-1] if args else options["fill_value"]
    return jnp.full(out.shape, cast(value, out.dtype))


@op("scalar_tensor")
def scalar_tensor(value: Any, *, out: Any, **options: Any) -> Any:
    """A number."""
    return cast(value, out.dtype)


@op("arange.default")
def arange(end: Any, *, out: Any, **options: Any) -> Any:
    """Numbers up to an end."""
    return jnp.arange(out.shape[0]).astype(out.dtype)


@op("arange.start", "arange.start_step")
def arange_from(start: Any, end: Any, step: Any = 1, *, out: Any, **options: Any) -> Any:
    """Numbers from a start, in steps."""
    return (start + step * np.arange(out.shape[0])).astype(out.dtype)


@op("linspace.default")
def linspace(start: Any, end: Any, steps: int, *, out: Any, **options: Any) -> Any:
    """Numbers between two, at equal distances."""
    return np.linspace(start, end, steps).astype(out.dtype)


@op("eye")
def eye(n: int, m: int | None = None, *, out: Any, **options: Any) -> Any:
    """The unit matrix."""
    return jnp.eye(*out.shape, dtype=out.dtype)
