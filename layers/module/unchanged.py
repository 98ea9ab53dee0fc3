"""Whether a torch module is still what it was: all that a copy of it would copy, but the values of its weights."""

import types
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def snapshot(module: torch.nn.Module) -> Any:
    """What to compare; it holds objects weakly, so that the module can die."""
    seen: set[int] = set()
    parts = list(module.named_modules(remove_duplicate=False))
    weights = [(*m._parameters.items(), *m._buffers.items()) for _, m in parts]
    attributes = [
        {k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters", "_buffers")} for _, m in parts
    ]
    return [
        [(path, weakref.ref(m)) for path, m in parts],
        [[(name, _weight(tensor)) for name, tensor in named] for named in weights],
        [_frozen(values, seen) for values in attributes],
    ]


def _weight(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (weakref.ref(tensor), tensor.requires_grad, tuple(tensor.shape), tensor.dtype)


def _frozen(value: Any, seen: set[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return (type(value), repr(value))
    if id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, Mapping):
        return [(_frozen(k, seen), _frozen(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_frozen(v, seen) for v in value]
    if isinstance(value, torch.Tensor):
        return (weakref.ref(value), None if value.is_inference() else value._version)
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), hash(value.tobytes()))
    try:
        held = weakref.ref(value)
    except TypeError:  # a dtype, a slice
        return value
    if isinstance(value, torch.nn.Module | type | types.ModuleType | types.FunctionType | types.MethodType):
        return held
    return (held, _frozen(getattr(value, "__dict__", None), seen))  # a configuration, a hook


def unchanged(before: Any, present: Any) -> bool:
    """Whether two snapshots are of the same module in the same state."""
    if isinstance(before, weakref.ref):
        return isinstance(present, weakref.ref) and before() is not None and before() is present()
    if isinstance(before, list | tuple):
        return (
            isinstance(present, type(before)) and len(before) == len(present) and all(map(unchanged, before, present))
        )
    return before is present or (isinstance(before, int | str) and before == present)
