"""Torch calls inside `jax.shard_map`: which mesh axes their operands and results vary over.

With `check_vma`, every operand of a primitive must vary over the same manual axes, and so do its results; the
transpose of the cast sums the gradients of replicated operands over the mesh.
Source: [shard_map](https://docs.jax.dev/en/latest/notebooks/shard_map.html).
"""

from collections.abc import Sequence
from typing import Any

import jax


def align(operands: Sequence[Any]) -> list[Any]:
    """Cast operands to vary over the union of their manual axes."""
    axes = [varying(jax.typeof(x)) for x in operands]
    union = frozenset().union(*axes)
    if not union:
        return list(operands)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes that a value varies over."""
    manual = getattr(aval, "mat", None)  # JAX 0.10; earlier releases had `vma` on the aval
    return getattr(aval, "vma", frozenset()) if manual is None else manual.varying
