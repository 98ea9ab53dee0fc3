"""A module's plain attributes around a forward pass: which it assigns, which are state, all put back after it."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch._subclasses.fake_tensor import FakeTensor

_ABSENT = object()
_Values = list[tuple[dict[str, Any], str, Any]]


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
    snapshots = [_Snapshot(f"{path}." if path else "", m) for path, m in module.named_modules()]
    try:
        yield changes
    finally:
        for snapshot in snapshots:
            changes += snapshot.undo()


class _Snapshot:
    """The attributes of one module, containers with their items."""

    def __init__(self, path: str, module: torch.nn.Module):
        self._path, self._namespace = path, vars(module)
        self._values = dict(self._namespace)
        self._items = {
            name: copy.copy(value)
            for name, value in self._values.items()
            if type(value) in (list, dict, set) and name not in _OF_EVERY_MODULE
        }
        self._computed_by_hooks = set(_computed_by_hooks(module))

    def undo(self) -> Iterator[Change]:
        for name in sorted(self._namespace.keys() | self._values.keys()):
            before, after = self._values.get(name, _ABSENT), self._namespace.get(name, _ABSENT)
            if before is not after:
                put_back([(self._namespace, name, before)])
                is_state = isinstance(after, bool | int | float | str) or isinstance(before, torch.Tensor)
                yield Change(self._path, name, is_state and name not in self._computed_by_hooks)
            elif name in self._items and not _same(before, self._items[name]):
                _refill(before, self._items[name])
                yield Change(self._path, name, is_state=True)


_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))


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


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)


def attribute_values(module: torch.nn.Module, attributes: Iterable[tuple[str, str]]) -> _Values:
    """The present values of attributes given as (dotted prefix, name), for `put_back`."""
    held = [(vars(module.get_submodule(path.rstrip("."))), name) for path, name in attributes]
    return [(namespace, name, namespace.get(name, _ABSENT)) for namespace, name in held]


def put_back(values: _Values) -> None:
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
    storages = {t.untyped_storage()._cdata for t in aliasing}
    for path, submodule in module.named_modules():
        attributes = {**vars(submodule), **submodule._buffers}
        del attributes["_buffers"]
        for name, value in attributes.items():
            for leaf in torch_pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor) and (
                    (fake and isinstance(leaf, FakeTensor)) or leaf.untyped_storage()._cdata in storages
                ):
                    yield f"{path}.{name}" if path else name
