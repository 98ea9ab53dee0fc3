"""What hangs on a module's attributes: plain objects and containers, in whatever depth, and the tensors in them."""

import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...interop.modes.host_random import is_generator

CONTAINERS = (list, dict, set, deque)
OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
"""The attributes that every module has."""

_MOST = 10_000  # a dataset is no state of a forward pass
_CLOSED = (torch.nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, str)


def own_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}


def reachable(namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever is in a namespace, in its containers and in the namespaces of its plain objects, by dotted name; what
    is in a container has its name."""
    seen: set[int] = set()
    waiting = list(namespace.items())
    while waiting and len(seen) < _MOST:
        name, value = waiting.pop()
        yield name, value
        if id(value) in seen or isinstance(value, _CLOSED):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [(name, item) for item in value.values()]
        elif isinstance(value, (*CONTAINERS, tuple)):
            waiting += [(name, item) for item in value]
        elif hasattr(value, "__dict__"):
            waiting += [(f"{name}.{attribute}", item) for attribute, item in vars(value).items()]


def held_by(namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The containers and plain objects among it, each once."""
    seen: set[int] = set()
    for name, value in reachable(namespace):
        is_open = isinstance(value, CONTAINERS) or is_generator(value)
        is_open |= hasattr(value, "__dict__") and not isinstance(value, _CLOSED)
        if is_open and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module and its submodules hold, but as parameters and buffers, by dotted name."""
    for path, submodule in module.named_modules():
        for name, value in reachable(own_attributes(submodule)):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value
