"""How XLA partitions a program with torch calls: along the batches of each call, and along nothing else.

In a program for several devices a call is lowered to a custom call of which XLA's partitioner knows a *sharding rule*
(which axes of operands and results are one batch) and a function that it asks for the program of one device. That
function is given the shardings that were chosen and answers with those that the call can have; XLA moves the data where
they differ. That is where something is gathered, and it is said (`gathers.py`).

Source: [custom_partitioning](https://docs.jax.dev/en/latest/jax.experimental.custom_partitioning.html),
[Shardy](https://openxla.org/shardy/sdy_dialect).
"""

import math
import secrets
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..calls.call import TorchCall, graphless
from ..calls.handles import BY_PLACE, HANDLE
from ..internals.jax import axes_left_to_xla, devices_of
from ..transport import lowering, threads
from . import gathers
from .batches import Axes, batches_of, part
from .splits import Spec, Splits, shards, spec_by, spec_of, splits_of


def lower(ctx: mlir.LoweringRuleContext, *operands: Any, call: TorchCall, repeats: bool) -> Any:
    """MLIR lowering of one torch call: for one device as it is, for several in parts."""
    devices = devices_of(ctx.module_context.axis_context)
    # JAX keeps the callback of a part no longer than it lowers it, and XLA would call what is gone.
    if len(devices) < 2 or not lowering.has_target(ctx.module_context):
        gathers.warn_within(call, axes_left_to_xla(ctx.module_context.axis_context))
        return lowering.lower(ctx, *operands, call=call, repeats=repeats)
    threads.settle()
    partitioning = _Partitioning(ctx.module_context, call, devices, repeats=repeats)
    plain = ctx.replace(avals_in=[aval.update(sharding=None) for aval in ctx.avals_in])
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        return mlir.lower_fun(partitioning.whole(), multiple_results=True)(plain, *operands)


_NO_MESH = AbstractMesh((), ())
_MARK = np.uint32(secrets.randbits(32))


class _Partitioning:
    """How one call in a module is partitioned."""

    def __init__(self, module: Any, call: TorchCall, devices: Sequence[Any], *, repeats: bool):
        self._module, self._call, self._devices, self._repeats = module, call, devices, repeats
        self._batches = batches_of(call)
        self._by_place = bool({*module.platforms} & BY_PLACE)

    def whole(self) -> Callable[..., list[jax.Array]]:
        """The call on all devices, for the partitioner."""
        carry = lowering.carrier(self._module, self._call, repeats=self._repeats)
        partitioned = custom_partitioning(lambda mark, *operands: carry(*operands))
        partitioned.def_partition(self._partition, sharding_rule=self._rule())
        # JAX's persistent cache knows a partitioned call by its address alone: the mark is another in each process.
        return lambda *operands: partitioned(_MARK, *operands)

    def _rule(self) -> SdyShardingRule:
        sizes = self._batches.sizes
        operands = _mappings("operand", sizes, self._batches.operands, [a.shape for a in self._call.in_avals])
        results = _mappings("result", sizes, self._batches.results, [a.shape for a in self._call.out_avals])
        return SdyShardingRule((ArrayMapping(), *operands), tuple(results))

    def _partition(self, mesh: Mesh, given: Any, wanted: Any) -> tuple[Any, ...]:
        """What the partitioner asks: the program of one device, and the shardings of its results and operands."""
        if mesh.empty:  # shardings that no mesh describes
            mesh = Mesh(np.array(self._devices), ("devices",))
            given, wanted = ([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals] for avals in (given, wanted))
        batches, operands = self._batches, given[1:]
        specs = [[spec_of(a.sharding, len(a.shape)) for a in avals] for avals in (operands, wanted)]
        values = [
            (where, spec, math.prod(a.shape) * a.dtype.itemsize)
            for axes, each, avals in zip((batches.operands, batches.results), specs, (operands, wanted), strict=True)
            for where, spec, a in zip(axes, each, avals, strict=True)
        ]
        splits = splits_of(batches, values, mesh.shape)
        taken, results = (
            [spec_by(splits, where, len(a.shape)) for where, a in zip(axes, avals, strict=True)]
            for axes, avals in ((batches.operands, operands), (batches.results, wanted))
        )
        gathers.warn(self._call, batches, specs[0], taken, splits)
        return (
            mesh,
            self._part(splits, mesh.shape),
            [_sharding(mesh, spec) for spec in results],
            (_sharding(mesh, ()), *(_sharding(mesh, spec) for spec in taken)),
        )

    def _part(self, splits: Splits, mesh: Mapping[str, int]) -> Callable[..., list[jax.Array]]:
        """The program of one device: the call on its part of each batch, and the sums over those of all."""
        n_parts = {level: shards(axes, mesh) for level, axes in splits.items()}
        call = part(self._call, n_parts)
        carry = self._carrier(call, tuple(n_parts.get(level, 1) for level in sorted(self._batches.sizes)))
        sums = [
            tuple(axis for level in sorted(self._batches.summed(i)) for axis in splits.get(level, ()))
            if aval is not HANDLE
            else ()
            for i, aval in enumerate(call.out_avals)
        ]

        def run(mark: jax.Array, *operands: jax.Array) -> list[jax.Array]:
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                return _summed(carry(splits, *operands), sums)

        return run

    def _carrier(self, call: TorchCall, parts: tuple[int, ...]) -> Callable[..., list[jax.Array]]:
        if not call.makes_handle and call.handle_operand is None:
            carry = lowering.carrier(self._module, call, repeats=self._repeats)
            return lambda splits, *operands: carry(*operands)
        if self._by_place:  # whether a handle keeps its place cannot be told before the program is partitioned
            return self._graphless(call)
        carry = lowering.carrier(self._module, call, repeats=self._repeats, parts=parts)
        return lambda splits, *operands: carry(*operands, _which(splits))

    def _graphless(self, call: TorchCall) -> Callable[..., list[jax.Array]]:
        graphless_call, kept = graphless(call)
        carry = lowering.carrier(self._module, graphless_call, repeats=self._repeats)
        handles = [jnp.zeros(HANDLE.shape, HANDLE.dtype)] if call.makes_handle else []
        return lambda splits, *operands: [*carry(*(operands[i] for i in kept)), *handles]


def _which(splits: Splits) -> jax.Array:
    """Which of all parts this device has: int32[]."""
    which = jnp.int32(0)
    for _, axes in sorted(splits.items()):
        which = which * jax.lax.axis_size(axes) + jax.lax.axis_index(axes)
    return which


def _summed(results: list[jax.Array], sums: Sequence[tuple[str, ...]]) -> list[jax.Array]:
    results = list(results)
    for axes in {*sums} - {()}:
        chosen = [i for i, over in enumerate(sums) if over == axes]
        for i, total in zip(chosen, jax.lax.psum([results[i] for i in chosen], axes), strict=True):
            results[i] = total
    return results


def _mappings(kind: str, levels: Container[int], axes: Axes, shapes: Sequence[tuple[int, ...]]) -> list[ArrayMapping]:
    """For each array the factors of its axes: those of batches are shared, all others are its own."""
    mappings = []
    for i, (where, shape) in enumerate(zip(axes, shapes, strict=True)):
        level_at = {axis: level for level, axis in where.items() if level in levels}
        factors = (f"batch{level_at[a]}" if a in level_at else f"{kind}{i}axis{a}" for a in range(len(shape)))
        mappings.append(ArrayMapping(*factors))
    return mappings


def _sharding(mesh: Mesh, spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
