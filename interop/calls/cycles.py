"""Graphs of torch that hold themselves, which torch itself never frees.

A `torch.autograd.Function` that keeps an output in its `ctx`, as an attribute, is in a circle through C++: the output
holds its node, the node the output. In torch that is a leak. Here it would be one of memory that belongs to XLA.

Source: [extending autograd](https://docs.pytorch.org/docs/stable/notes/extending.html#how-to-use).
"""

import gc
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch

from ..values.memory import has_storage, storage_of
from .reverse import nodes


def free_circular_graphs(storages: Collection[int]) -> None:
    """Take apart each that holds memory of these storages, which nothing may hold any more."""
    for ctx in [x for x in gc.get_objects() if issubclass(type(x), torch.autograd.function.BackwardCFunction)]:
        tensors = list(_tensors_behind(vars(ctx)))
        if any(ctx is node for node in nodes(tensors)) and any(
            has_storage(x) and storage_of(x) in storages for x in (*tensors, *_saved(ctx))
        ):
            vars(ctx).clear()


def _saved(ctx: Any) -> tuple[torch.Tensor, ...]:
    try:
        return tuple(x for x in ctx.saved_tensors if x is not None)
    except RuntimeError:  # a backward pass has freed them, or they are found by its operands only
        return ()


def _tensors_behind(root: Any, most: int = 10_000) -> Iterator[torch.Tensor]:
    """Those that a value leads to, through containers, objects and closures."""
    seen, waiting = set[int](), [root]
    while waiting and len(seen) < most:
        held = waiting.pop()
        if id(held) in seen or isinstance(held, type | types.ModuleType):
            continue
        seen.add(id(held))
        if isinstance(held, torch.Tensor):
            yield held
            waiting.append(held._base)  # which a view holds, with its node
        elif isinstance(held, types.FunctionType):  # its globals are not its own
            waiting += held.__closure__ or ()
        else:
            waiting += gc.get_referents(held)
