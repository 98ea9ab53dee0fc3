"""torch's promotion of dtypes, among JAX arrays and Python numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..values import dtypes

Number = bool | int | float | complex


def to_jax(dtype: torch.dtype) -> np.dtype:
    """The dtype that JAX gives what is of this one in torch."""
    return dtypes.canonical(dtype)


def is_array(x: Any) -> bool:
    """Whether x stands for a tensor."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def category(dtype: Any) -> int:
    """0 for bool, 1 for integers, 2 for real numbers, 3 for complex ones: those of higher ones decide."""
    if dtype == jnp.bool_:
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 3 if jnp.issubdtype(dtype, jnp.complexfloating) else 2


def result_type(*args: Any) -> np.dtype:
    """`torch.result_type`: dtypes of arrays with axes decide, unless those without, or numbers, are of a higher kind.

    Source: [tensor attributes](https://docs.pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc).
    """
    arrays = [x for x in args if is_array(x)]
    ranked = [
        _joined([x.dtype for x in arrays if x.ndim]),
        _joined([x.dtype for x in arrays if not x.ndim]),
        _joined([_of_number(x) for x in args if isinstance(x, Number)]),
    ]
    found: Any = None
    for dtype in ranked:
        if dtype is not None and (found is None or category(dtype) > category(found)):
            is_scalar = found is not None and dtype is ranked[2]
            found = _widened(dtype, found) if is_scalar or found is not None else dtype
    return jnp.dtype(found)


def _widened(dtype: Any, by: Any) -> Any:
    """A complex dtype as wide as the real one it replaces; any other as it is."""
    if category(dtype) == 3 and category(by) == 2:
        return jnp.promote_types(by, jnp.complex64) if by != jnp.float16 else jnp.complex64
    return dtype


def _joined(found: list[Any]) -> Any:
    if not found:
        return None
    joined = found[0]
    for dtype in found[1:]:
        joined = jnp.promote_types(joined, dtype)
    return joined


def _of_number(x: Number) -> np.dtype:
    if isinstance(x, bool):
        return jnp.dtype(bool)
    kind = torch.int64 if isinstance(x, int) else torch.get_default_dtype()
    return to_jax(kind) if not isinstance(x, complex) else jnp.promote_types(to_jax(kind), jnp.complex64)


def opmath(dtype: Any) -> np.dtype:
    """The dtype that torch computes in: half precision is computed in single."""
    return jnp.dtype(jnp.float32) if category(dtype) == 2 and jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def cast(x: Any, dtype: Any) -> jax.Array:
    """x in a dtype, as torch converts: complex numbers lose their imaginary part."""
    x = jnp.asarray(x)
    if x.dtype == dtype:
        return x
    if category(x.dtype) == 3 and category(dtype) < 3 and category(dtype) > 0:
        x = x.real
    if category(x.dtype) == 2 and category(dtype) == 1 and not jnp.issubdtype(dtype, jnp.signedinteger):
        x = x.astype(jnp.int32 if jnp.dtype(dtype).itemsize < 4 else jnp.int64)  # wraps around, as in C
    return x.astype(dtype)
