"""The types of a call's results on a mesh: what they vary over in `shard_map`, how they lie on explicit axes.

On explicit axes an array's sharding is part of its type, so what a call cannot be split along is an error when it is
traced. Axes that are automatic are XLA's affair (`partition.py`).

Source: [explicit sharding](https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from jax.core import ShapedArray
from jax.sharding import AxisType, PartitionSpec

from ..calls.call import TorchCall
from ..errors import TorchCallError
from .batches import batches_of
from .gathers import REMEDY, name_of
from .manual import varying
from .splits import Splits, spec_by, spec_of


def result_types(call: TorchCall, operands: Sequence[Any]) -> list[ShapedArray]:
    """The types of the results of a call on operands of these types.

    **Raises:** `TorchCallError` if an operand lies in a way that the call cannot be split, on explicit axes.
    """
    like = next((aval for aval in operands if varying(aval) or _is_explicit(aval)), None)
    if like is None:
        return [ShapedArray(aval.shape, aval.dtype) for aval in call.out_avals]
    splits, results = _explicit_splits(call, operands), []
    for aval, where in zip(call.out_avals, batches_of(call).results, strict=True):
        spec = PartitionSpec(*(axes or None for axes in spec_by(splits, where, len(aval.shape))))
        sharding = like.sharding.update(spec=spec)
        results.append(like.update(shape=aval.shape, dtype=aval.dtype, weak_type=False, sharding=sharding))
    return results


def _is_explicit(aval: Any) -> bool:
    return AxisType.Explicit in aval.sharding.mesh.axis_types


def _explicit_splits(call: TorchCall, operands: Sequence[Any]) -> Splits:
    """The mesh axes of each batch, by the types of the operands."""
    batches, splits, first = batches_of(call), dict[int, tuple[str, ...]](), dict[int, int]()

    def refuse(i: int, why: str, remedy: str) -> NoReturn:
        raise TorchCallError(f"{call.base.name}: {name_of(call, i)} is {operands[i].str_short()}: {why}. {remedy}.")

    for i, aval in enumerate(operands):
        if aval.sharding.spec.unreduced:
            refuse(i, "a sum over devices that is still to be taken", f"Take it before the call: {_RESHARD}")
        level_at = {axis: level for level, axis in batches.operands[i].items()}
        for axis, over in enumerate(spec_of(aval.sharding, aval.ndim)):
            level = level_at.get(axis)
            if not over or (level is not None and splits.get(level) == over):
                continue
            if level is None or level in batches.whole:
                why = "it is no axis of jax.vmap" if level is None else batches.whole[level]
                refuse(i, f"its axis {axis} is split over {over}, but {why}", f"{REMEDY}; or gather it: {_RESHARD}")
            for other, taken in splits.items():
                if other == level or {*taken} & {*over}:
                    given = f"{name_of(call, first[other])} is {operands[first[other]].str_short()}"
                    same = "one batch over different mesh axes" if other == level else "two batches over one mesh axis"
                    refuse(i, f"{given}: {same}", f"Have them lie alike: {_RESHARD}")
            splits[level], first[level] = over, i
    return splits


_RESHARD = "jax.sharding.reshard(x, jax.P(...))"
