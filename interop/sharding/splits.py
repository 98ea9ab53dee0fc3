"""Over which mesh axes each batch of a call is split, given how its operands and results lie."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .batches import Batches

Spec = tuple[tuple[str, ...], ...]
"""For each axis of an array, the mesh axes it is split over."""
Splits = Mapping[int, tuple[str, ...]]
"""Level to mesh axes."""
Value = tuple[Mapping[int, int], Spec, int]
"""Of an operand or result: its batches, how it lies, its bytes."""


def spec_of(sharding: Any, ndim: int) -> Spec:
    """The mesh axes of each axis of an array."""
    given = () if sharding is None else sharding.spec
    spec = [e if isinstance(e, tuple) else (e,) if isinstance(e, str) else () for e in given]
    return (*spec, *([()] * (ndim - len(spec))))


def splits_of(batches: Batches, values: Sequence[Value], mesh: Mapping[str, int]) -> Splits:
    """How to split each batch: as the largest of the operands and results, is.

    A batch whose size its mesh axes do not divide stays whole.
    """
    splits: dict[int, tuple[str, ...]] = {}
    for level, axes in _by_weight(values):
        taken = {axis for by in splits.values() for axis in by}
        size = batches.sizes.get(level, 0)
        if level not in splits and size and not taken & {*axes} and size % shards(axes, mesh) == 0:
            splits[level] = axes
    return splits


def _by_weight(values: Sequence[Value]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for where, spec, _ in sorted(values, key=lambda value: -value[2]):
        for level, axis in where.items():
            if spec[axis]:
                yield level, spec[axis]


def shards(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    """Into how many parts mesh axes split."""
    return math.prod(mesh[axis] for axis in axes)


def spec_by(splits: Splits, where: Mapping[int, int], ndim: int) -> Spec:
    """How an operand or result lies when the batches are split."""
    spec: list[tuple[str, ...]] = [()] * ndim
    for level, axis in where.items():
        spec[axis] = splits.get(level, ())
    return tuple(spec)
