"""The batches of a call: along which axes its operands and results can be split over devices.

Each `jax.vmap` that a call came through is a batch of independent examples, known by its *level* (`TorchCall.depth`).
A device that has some of the examples can compute their results alone; what a result has no axis for is a sum over the
examples (a gradient of weights that they share), to which each device gives its part. All other axes are torch's own.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..calls.base import Base
from ..calls.batching import Vmap
from ..calls.call import TorchCall, graphless
from ..calls.derivative import Jvp, Vjp
from ..calls.per_example import PerExampleVjp
from ..calls.save import Save

Axes = tuple[Mapping[int, int], ...]
"""Of each operand or result: level to axis."""


@dataclass(frozen=True)
class Batches:
    """The batches of a call.

    **Fields:**

    - `sizes`: level to number of examples, of the batches that can be split;
    - `whole`: level to the reason why a batch cannot be;
    - `operands`, `results`: where the batches lie, those of `whole` included.
    """

    sizes: Mapping[int, int]
    whole: Mapping[int, str]
    operands: Axes
    results: Axes

    def summed(self, result: int) -> frozenset[int]:
        """Of the batches that can be split, those that a result is a sum over."""
        return frozenset(self.sizes) - self.results[result].keys()


def batches_of(call: TorchCall) -> Batches:
    """The batches of a call."""
    return call.derive(_batches_of)


@functools.singledispatch
def _batches_of(call: TorchCall) -> Batches:
    raise TypeError(f"{type(call).__name__} has no batches")


@_batches_of.register
def _(call: Base) -> Batches:
    return Batches({}, {}, ({},) * len(call.in_avals), ({},) * len(call.out_avals))


@_batches_of.register
def _(call: Vmap) -> Batches:
    inner, level = batches_of(call.inner), call.depth
    operands = tuple(_with(a, level, d) for a, d in zip(inner.operands, call.in_dims, strict=True))
    results = tuple(_with(a, level, d) for a, d in zip(inner.results, call.out_dims, strict=True))
    reason = _why_whole(call)
    sizes = {**inner.sizes, **({} if reason else {level: call.size})}
    return Batches(sizes, {**inner.whole, **({level: reason} if reason else {})}, operands, results)


def _why_whole(call: Vmap) -> str | None:
    """Why the examples of a batch cannot be computed apart from each other; None if they can."""
    if any(call.out_dims[out] is None for _, out in call.state):
        return "its examples share state, which is that of the whole batch"
    if call.method == "batched" and _draws(call.base):
        return (
            "with vmap_method='batched' random numbers are drawn for the whole batch; vmap_method='vmap' draws for each"
        )
    return None


def _draws(base: Base) -> bool:
    """Whether its last operand is the key of its random numbers."""
    last = len(base.in_avals) - 1
    return last >= 0 and base.operand_name(last) == "argument key" and base.in_avals[last].dtype == np.uint32


@_batches_of.register(Jvp)
@_batches_of.register(Vjp)
def _(call: Jvp | Vjp) -> Batches:
    inner = batches_of(call.inner)
    active, outs = (tuple(inner.operands[i] for i in call.active), tuple(inner.results[o] for o in call.outs))
    linear, results = (active, outs) if isinstance(call, Jvp) else (outs, active)
    return Batches(inner.sizes, inner.whole, (*inner.operands, *([{}] * call.live), *linear), results)


@_batches_of.register
def _(call: Save) -> Batches:
    found = batches_of(graphless(call)[0])
    return Batches(found.sizes, found.whole, found.operands, (*found.results, {}))


@_batches_of.register
def _(call: PerExampleVjp) -> Batches:
    inner, kept = graphless(call)
    batches = batches_of(inner)
    where = dict(zip(kept, batches.operands, strict=True))
    operands = tuple(where.get(i, {}) for i in range(len(call.in_avals)))
    return Batches(batches.sizes, batches.whole, operands, batches.results)


def _with(axes: Mapping[int, int], level: int, dim: int | None) -> Mapping[int, int]:
    if dim is None:
        return axes
    return {**{other: axis + (axis >= dim) for other, axis in axes.items()}, level: dim}


def part(call: TorchCall, shards: Mapping[int, int]) -> TorchCall:
    """The same call on one of `shards[level]` equal parts of each batch."""
    shards = {level: n for level, n in shards.items() if n > 1}
    return call.derive(_part, tuple(sorted(shards.items()))) if shards else call


def _part(call: TorchCall, shards: tuple[tuple[int, int], ...]) -> TorchCall:
    return _resized(call, dict(shards))


@functools.singledispatch
def _resized(call: TorchCall, shards: Mapping[int, int]) -> TorchCall:
    return call


@_resized.register
def _(call: Vmap, shards: Mapping[int, int]) -> TorchCall:
    size = call.size // shards.get(call.depth, 1)
    return part(call.inner, shards).derive(Vmap, call.in_dims, call.out_dims, size, call.method)


@_resized.register(Jvp)
@_resized.register(Vjp)
def _(call: Jvp | Vjp, shards: Mapping[int, int]) -> TorchCall:
    return part(call.inner, shards).derive(type(call), call.active, call.outs, call.live)


@_resized.register
def _(call: Save, shards: Mapping[int, int]) -> TorchCall:
    inner = part(call.inner, shards)
    if call.batch is None:
        return inner.derive(Save, call.active)
    dims, size = call.batch
    return inner.derive(Save, call.active, (dims, size // shards.get(graphless(call)[0].depth, 1)))


@_resized.register
def _(call: PerExampleVjp, shards: Mapping[int, int]) -> TorchCall:
    return call.part(lambda vjp: part(vjp, shards), shards.get(graphless(call)[0].depth, 1))
