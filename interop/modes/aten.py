"""What torch says of an aten op: its arguments by name, and which tensors it writes into."""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from ..internals.ops import saved_tensor_hooks


def bound(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an op by name."""
    declared = op._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return defaults | dict(zip((a.name for a in declared), args, strict=False)) | kwargs


def tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an op, or among what it returned, in lists as well."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)


def written(op: Any, arguments: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors an op writes into."""
    for argument in op._schema.arguments:
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or (argument.name in STATISTICS and _updates_statistics(op, arguments)):
            value = arguments.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    yield tensor


@functools.cache
def reads_values(op: Any) -> bool:
    """Whether an op gives values of its operands to Python, as `.item()` and `torch.equal` do."""
    returns = [str(r.type) for r in op._schema.returns]
    return torch.Tag.data_dependent_output in op.tags and bool(returns) and not any("Tensor" in t for t in returns)


STATISTICS = ("running_mean", "running_var")


def _updates_statistics(op: Any, arguments: dict[str, Any]) -> bool:
    """Whether a batch norm writes into its running statistics, which most of its variants do not declare."""
    in_training = arguments.get("training", arguments.get("train", True))
    return in_training and not any(mark in op.name() for mark in ("backward", "functional", "_no_"))


def in_checkpoint() -> bool:
    """Whether code is running within `torch.utils.checkpoint`, which runs it again in the backward pass."""
    hooks = saved_tensor_hooks()
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def in_reentrant_checkpoint() -> bool:
    """Whether code is running within one of the kind that is an `autograd.Function` and runs without gradients."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


_REENTRANT = CheckpointFunction.forward.__code__
