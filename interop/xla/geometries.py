"""Ops that give a tensor another geometry over its memory: those that resize it, and views by strides."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import torch

from .graph import Ref
from .memory import Memory, flat
from .names import is_inplace_view

RESIZING = {torch.ops.aten.resize_.default, torch.ops.aten.resize_as_.default}
STRIDED = {torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default}

AddNode = Callable[[str, Callable[..., Any], tuple[Any, ...], torch.Tensor], int]
"""Adds a node that makes a value like that of a tensor."""


def resized(memory: Memory, add: AddNode, func: Any, args: Any, kwargs: Any) -> Any:
    """A tensor in another shape over the same memory, which grows if need be; by what, torch leaves open."""
    before = flat(args[0])
    sides = memory.read_sides(before)
    result = func(*args, **kwargs)
    after = flat(args[0])
    if after.shape != before.shape:
        sides = [add("resize", lambda x: jnp.resize(x, after.shape), (Ref(x),), after) for x in sides]
    memory.replace(after, sides)
    return result


def strided(memory: Memory, func: Any, args: Any, kwargs: Any) -> Any:
    """A view by strides, which are those of memory, in whatever order the tensor's elements lie there."""
    source, in_place = args[0], is_inplace_view(func)
    side = memory.side_of(source)
    result = func(*args, **kwargs)
    value = memory.on_side(result, side)
    if in_place:
        memory.add(result, value)
    else:
        memory.add_view(result, value, [source], detached=not torch.is_grad_enabled())
    return result
