"""A module's plain attributes around a forward pass: which it assigns, which are state, all put back after it.

Those of plain objects that it holds count as its own: a cache is often one.
"""

import contextlib
import copy
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch._subclasses.fake_tensor import FakeTensor

from ..interop.aten import storage_of
from .scripted import ScriptSlots

_ABSENT = object()
Values = list[tuple[dict[str, Any], str, Any]]


@dataclass(frozen=True)
class Change:
    """An attribute that a forward pass changed."""

    path: str
    """Its module, as a dotted prefix."""
    name: str
    is_state: bool
    """Whether a later call could see the change, so that dropping it would give other results."""


@contextlib.contextmanager
def attribute_changes(module: torch.nn.Module) -> Iterator[list[Change]]:
    """Notes each attribute that changes meanwhile, and puts all back."""
    changes: list[Change] = []
    snapshots = [
        snapshot
        for path, submodule in module.named_modules()
        for snapshot in _snapshots(f"{path}." if path else "", submodule)
    ]
    try:
        yield changes
    finally:
        for snapshot in snapshots:
            changes += snapshot.undo()


def _snapshots(path: str, module: torch.nn.Module) -> Iterator["_Snapshot | _ScriptSnapshot"]:
    yield _Snapshot(path, module, put_back_in_calls=True, ignored=set(_computed_by_hooks(module)))
    if isinstance(module, torch.jit.ScriptModule):
        yield _ScriptSnapshot(path, module)
    for name, owner in _objects(own_attributes(module)):
        yield _Snapshot(f"{path}{name}.", owner, put_back_in_calls=False)


class _Snapshot:
    """The attributes of one module or object, containers with their items."""

    def __init__(self, path: str, owner: Any, *, put_back_in_calls: bool, ignored: Iterable[str] = ()):
        self._path, self._namespace = path, vars(owner)
        self._put_back_in_calls, self._ignored = put_back_in_calls, ignored
        self._values = dict(self._namespace)
        self._items = {
            name: copy.copy(value)
            for name, value in self._values.items()
            if type(value) in (list, dict, set) and name not in _BOOKKEEPING
        }

    def undo(self) -> Iterator[Change]:
        for name in sorted(self._namespace.keys() | self._values.keys()):
            before, after = self._values.get(name, _ABSENT), self._namespace.get(name, _ABSENT)
            if before is not after:
                put_back([(self._namespace, name, before)])
                is_state = isinstance(after, bool | int | float | str) or isinstance(before, torch.Tensor)
                is_state |= not self._put_back_in_calls and isinstance(after, torch.Tensor)
                if is_state or self._put_back_in_calls:
                    yield Change(self._path, name, is_state and name not in self._ignored)
            elif name in self._items and not _same(before, self._items[name]):
                shown = _first_difference(before, self._items[name]) if name == "_modules" else name
                _refill(before, self._items[name])
                yield Change(self._path, shown, is_state=True)


class _ScriptSnapshot:
    """The attributes of a TorchScript module that are no weights; lists come out of it as new ones each time."""

    def __init__(self, path: str, module: torch.jit.ScriptModule):
        self._path, self._slots = path, ScriptSlots(module)
        self._values = self._slots.unregistered()

    def undo(self) -> Iterator[Change]:
        for name, after in self._slots.unregistered().items():
            before = self._values[name]
            same = before is after if isinstance(before, torch.Tensor) else repr(before) == repr(after)
            if not same:
                self._slots[name] = before
                yield Change(self._path, name, is_state=True)


_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_BOOKKEEPING = _OF_EVERY_MODULE - {"_modules"}


def own_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _objects(namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Plain objects in a namespace, in its containers and in their namespaces, by dotted name; each once."""
    seen: set[int] = set()
    waiting = list(namespace.items())
    while waiting and len(seen) < _MOST_OBJECTS:
        name, value = waiting.pop()
        if id(value) in seen or isinstance(value, _NO_PLAIN_OBJECTS):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [(name, item) for item in value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, item) for item in value]
        elif hasattr(value, "__dict__"):
            yield name, value
            waiting += [(f"{name}.{attribute}", item) for attribute, item in vars(value).items()]


_MOST_OBJECTS = 10_000  # a dataset is no state of a forward pass
_NO_PLAIN_OBJECTS = (torch.nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)


def _computed_by_hooks(module: torch.nn.Module) -> Iterator[str]:
    """Attributes that torch's own hooks (weight_norm, spectral_norm, pruning) write before each forward."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if type(hook).__module__.startswith("torch.nn.utils") and isinstance(name, str):
            yield name


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same items."""
    if isinstance(a, set):
        return a == b
    keys_equal = list(a) == list(b) if isinstance(a, dict) else len(a) == len(b)
    values = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=False)
    return keys_equal and all(x is y for x, y in values)


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    return next(name for name in a | b if a.get(name) is not b.get(name))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)


def attribute_values(module: torch.nn.Module, attributes: Iterable[tuple[str, str]]) -> Values:
    """The present values of attributes given as (dotted prefix, name), for `put_back`."""
    held = [(vars(_part(module, path)), name) for path, name in attributes]
    return [(namespace, name, namespace.get(name, _ABSENT)) for namespace, name in held]


def _part(module: torch.nn.Module, path: str) -> Any:
    """A submodule by its dotted prefix; those of TorchScript have no `get_submodule`."""
    part: Any = module
    for name in path.split(".")[:-1]:
        part = part._modules[name]
    return part


def put_back(values: Values) -> None:
    """Give attributes the values they had."""
    for namespace, name, value in values:
        if value is _ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value


def stray_tensors(
    module: torch.nn.Module, *, aliasing: Sequence[torch.Tensor] = (), fake: bool = False
) -> Iterator[str]:
    """Attributes, by dotted name, that hold tensors sharing memory with `aliasing`, or fake tensors."""
    storages = {storage_of(t) for t in aliasing}
    for path, submodule in module.named_modules():
        held = [*vars(submodule).items(), *submodule._buffers.items()]
        for owner_name, owner in _objects(own_attributes(submodule)):
            held += [(f"{owner_name}.{name}", value) for name, value in vars(owner).items()]
        for name, value in held:
            for leaf in torch_pytree.tree_leaves(value) if name != "_buffers" else ():
                if isinstance(leaf, torch.Tensor) and (
                    (fake and isinstance(leaf, FakeTensor)) or storage_of(leaf) in storages
                ):
                    yield f"{path}.{name}" if path else name
