"""What is gathered where a call is partitioned, and what to do about it: said once for each callable."""

import warnings
import weakref
from collections.abc import Iterator, Sequence

from ..calls.base import Base
from ..calls.call import TorchCall
from .batches import Batches
from .splits import Spec, Splits

_warned: "weakref.WeakSet[Base]" = weakref.WeakSet()

REMEDY = (
    "torch's code can be split over devices along the axes of jax.vmap only. Call it for one example under jax.vmap "
    "(with vmap_method='batched' if it is faster on whole batches), or on each device's part inside jax.shard_map"
)


def warn(call: TorchCall, batches: Batches, given: Sequence[Spec], taken: Sequence[Spec], splits: Splits) -> None:
    """Warn, once, if operands are split over devices in a way that the call cannot be."""
    found = list(_gathered(call, batches, given, taken, splits))
    if found and call.base not in _warned:
        _warned.add(call.base)
        warnings.warn(
            f"{call.base.name}: in a program for several devices, {'; '.join(found)}. It is gathered, so that devices "
            f"compute the same. {REMEDY}.",
            stacklevel=2,
        )


def warn_within(call: TorchCall, axes: Sequence[str]) -> None:
    """Warn, once, of a call in a `shard_map` that leaves mesh axes to XLA, which cannot partition it there."""
    if axes and call.base not in _warned:
        _warned.add(call.base)
        warnings.warn(
            f"{call.base.name}: in a jax.shard_map that is not over the mesh axes {_mesh_axes(axes)}, what is split "
            "over these is gathered, so that devices compute the same. Name all axes (leave `axis_names` out), or call "
            "it outside.",
            stacklevel=2,
        )


def _gathered(
    call: TorchCall, batches: Batches, given: Sequence[Spec], taken: Sequence[Spec], splits: Splits
) -> Iterator[str]:
    batch_axes = {axis for axes in splits.values() for axis in axes}
    for i, (before, after) in enumerate(zip(given, taken, strict=True)):
        levels = {axis: level for level, axis in batches.operands[i].items()}
        for axis, (was, now) in enumerate(zip(before, after, strict=True)):
            if set(was) <= set(now):
                continue
            if axis in levels and not now:
                yield f"{name_of(call, i)} is split over {_mesh_axes(was)} ({_why(batches, levels[axis])})"
            elif not set(was) <= batch_axes:  # else as weights are gathered in any data-parallel program (FSDP)
                yield f"{name_of(call, i)} is split over {_mesh_axes(was)} along axis {axis}"


def _why(batches: Batches, level: int) -> str:
    size = batches.sizes.get(level)
    return batches.whole[level] if size is None else f"which cannot split its batch of {size} evenly"


def _mesh_axes(axes: Sequence[str]) -> str:
    return ", ".join(map(repr, axes))


def name_of(call: TorchCall, operand: int) -> str:
    """How errors call an operand of a call."""
    if operand < len(call.base.in_avals):
        return call.base.operand_name(operand)
    return f"operand {operand} of {call.name} (a tangent or cotangent)"
