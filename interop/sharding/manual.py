"""Torch calls inside `jax.shard_map`: which mesh axes their operands and results vary over.

With `check_vma`, every operand of a primitive must vary over the same manual axes, and so do its results; the
transpose of the cast sums the gradients of replicated operands over the mesh.
Source: [shard_map](https://docs.jax.dev/en/latest/notebooks/shard_map.html).
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import PartitionSpec


def align(operands: Sequence[Any]) -> list[Any]:
    """Cast operands to vary over the union of their manual axes."""
    axes = [_varying(jax.typeof(x)) for x in operands]
    union = frozenset().union(*axes)
    if not union:
        return list(operands)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


def result_aval(shape: tuple[int, ...], dtype: Any, operand_avals: Sequence[Any]) -> ShapedArray:
    """The aval of a result, varying over the axes the operands vary over."""
    for aval in operand_avals:
        if _varying(aval):
            replicated = aval.sharding.update(spec=PartitionSpec(*([None] * len(shape))))
            return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=replicated)
    return ShapedArray(shape, dtype)


def _varying(aval: Any) -> frozenset[str]:
    manual = getattr(aval, "mat", None)  # JAX 0.10; earlier releases had `vma` on the aval
    return getattr(aval, "vma", frozenset()) if manual is None else manual.varying
