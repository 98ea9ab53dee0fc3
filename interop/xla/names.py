"""Ops by the names of those that write nothing: `add_.Tensor` and `add.out` are `add`."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..modes.aten import bound, written


@functools.cache
def functional_name(func: Any) -> str:
    """The name of an op in the table, `add.Tensor`; of an op that is none of aten's with its namespace."""
    name, overload = func.overloadpacket.__name__, func._overloadname
    if func.namespace not in ("aten", "prims"):
        return f"{func.namespace}::{name}.{overload}"
    if func.namespace == "prims":
        return f"prims::{name}"
    if out_names(func):
        return _without_out(func)
    if _writes_first(func):
        return f"{_plain(name)}.{overload}"
    return f"{name}.{overload}"


def _without_out(func: Any) -> str:
    """The overload that takes the same but for places for results; names need not be alike: `div.out`, `div.Tensor`."""
    name = _plain(func.overloadpacket.__name__)
    packet, wanted = getattr(torch.ops.aten, name, func.overloadpacket), _taken(func)
    for overload in packet.overloads():
        other = getattr(packet, overload)
        if not out_names(other) and _taken(other) == wanted:
            return f"{name}.{overload}"
    return f"{name}.{func._overloadname.removesuffix('out').removesuffix('_') or 'default'}"


def _plain(name: str) -> str:
    return name if name.startswith("__") else name.removesuffix("_")


def _taken(func: Any) -> list[tuple[str, str]]:
    """The arguments of an op without what an `out` says: places for results, their dtype, layout and device."""
    places = {*out_names(func), "dtype", "layout", "device", "pin_memory"}
    return [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in places]


def _writes_first(func: Any) -> bool:
    first = func._schema.arguments[0].alias_info if func._schema.arguments else None
    return first is not None and first.is_write


def out_names(func: Any) -> frozenset[str]:
    """The arguments of an op that are but places for its results: `out`."""
    return frozenset(
        a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write
    )


def targets(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op writes into, each once."""
    return list({id(x): x for x in written(func, bound(func, args, kwargs))}.values())


def is_inplace_view(func: Any) -> bool:
    """Whether an op changes the geometry of its operand and no value: `t_`."""
    return torch.Tag.inplace_view in func.tags


@functools.cache
def parameters(func: Any) -> tuple[str, ...]:
    """The names of the arguments of an op; none of a function that is no op."""
    return tuple(a.name for a in func._schema.arguments) if hasattr(func, "_schema") else ()


@functools.cache
def size_names(func: Any) -> frozenset[str]:
    """Those that are sizes or positions, and not numbers to compute with."""
    declared = func._schema.arguments if hasattr(func, "_schema") else ()
    return frozenset(a.name for a in declared if "int" in str(a.type))
