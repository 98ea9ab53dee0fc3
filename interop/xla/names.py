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
    if overload.endswith("out"):
        return f"{name.removesuffix('_')}.{overload.removesuffix('out').removesuffix('_') or 'default'}"
    if name.endswith("_") and not name.startswith("__") and _writes_first(func):
        return f"{name.removesuffix('_')}.{overload}"
    return f"{name}.{overload}"


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
