"""A module's plain attributes around a forward pass: which it changes, which are state, all put back after it.

Those of plain objects that it holds count as its own, and so do the items of containers: a cache is often one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...interop.internals.fake import FakeTensor
from ...interop.internals.ops import torch_pytree
from ...interop.modes.host_random import is_generator, is_same_state, set_state, state_of
from ...interop.values.memory import has_storage, storage_of
from .plain_objects import CONTAINERS, held_by, own_attributes, tensors_of
from .scripted import ScriptSlots

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """An attribute that a forward pass changed."""

    name: str
    """Its dotted name."""
    place: int
    """The number of the place in which it is."""
    is_state: bool
    """Whether a later call could see the change, so that dropping it would give other results."""


Values = list[tuple["_Place", Any]]
"""Places of attributes, each with what is in it."""


class Attributes:
    """Where the attributes of a module are that is not running."""

    def __init__(self, module: torch.nn.Module):
        self._places = [
            place
            for path, submodule in module.named_modules()
            for place in _places(f"{path}." if path else "", submodule)
        ]
        for number, place in enumerate(self._places):
            place.number = number
        self._tensors = [(name, tensor) for name, tensor in tensors_of(module) if not tensor.is_inference()]

    def values(self, places: Iterable[int] | None = None) -> Values:
        """What is in all places, or in those of these numbers, for `put_back`."""
        chosen = self._places if places is None else [self._places[number] for number in places]
        return [(place, place.items()) for place in chosen]

    def versions(self) -> list[int]:
        """How often tensors in attributes were written."""
        return [tensor._version for _, tensor in self._tensors]

    def written(self, versions: Sequence[int]) -> str | None:
        """An attribute whose tensor has been written since then."""
        present = zip(self._tensors, versions, strict=True)
        return next((name for (name, tensor), version in present if tensor._version != version), None)


def put_back(values: Values) -> list[Change]:
    """Give attributes the values they had; those that had changed."""
    return [change for place, items in values for change in place.put_back(items)]


def _places(path: str, module: torch.nn.Module) -> Iterator["_Place"]:
    yield _Namespace(path, vars(module), of_module=True, ignored=frozenset(_computed_by_hooks(module)))
    if isinstance(module, torch.jit.ScriptModule):
        yield _Script(path, ScriptSlots(module))
        return
    yield _Container(path, "_modules", vars(module)["_modules"])
    yield _LateBuffers(path, module)
    for name, value in held_by(own_attributes(module)):
        if is_generator(value):
            yield _Generator(path, name, value)
        elif isinstance(value, CONTAINERS):
            yield _Container(path, name, value)
        else:
            yield _Namespace(f"{path}{name}.", vars(value), of_module=False)


class _Place(ABC):
    """Something that attributes are in."""

    number = 0

    @abstractmethod
    def items(self) -> Any:
        """What is in it, to be put back."""

    @abstractmethod
    def put_back(self, items: Any) -> Iterable[Change]:
        """Put what was in it back; what had changed."""


class _Namespace(_Place):
    """The attributes of one module or object."""

    def __init__(self, path: str, namespace: dict[str, Any], *, of_module: bool, ignored: frozenset[str] = frozenset()):
        self._path, self._namespace, self._of_module, self._ignored = path, namespace, of_module, ignored

    def items(self) -> dict[str, Any]:
        return self._namespace.copy()

    def put_back(self, items: dict[str, Any]) -> Iterable[Change]:
        namespace = self._namespace
        if len(items) == len(namespace) and all(map(_is, items.values(), namespace.values())):
            return ()
        names = sorted(items.keys() | namespace.keys())
        found = [(name, items.get(name, _ABSENT), namespace.get(name, _ABSENT)) for name in names]
        namespace.clear()
        namespace.update(items)
        changes = (self._change(*one) for one in found if not _is(*one[1:]))
        return [change for change in changes if change is not None]

    def _change(self, name: str, before: Any, after: Any) -> Change | None:
        if _is_equal(before, after):
            return None
        is_state = isinstance(after, bool | int | float | str) or isinstance(before, torch.Tensor)
        is_state |= not self._of_module and isinstance(after, torch.Tensor)
        if not (is_state or self._of_module):
            return None
        return Change(f"{self._path}{name}", self.number, is_state and name not in self._ignored)


class _Container(_Place):
    """The items of one list, dict, set or deque."""

    def __init__(self, path: str, name: str, container: Any):
        self._path, self._name, self._container = path, name, container

    def items(self) -> Any:
        return self._container.copy()

    def put_back(self, items: Any) -> Iterable[Change]:
        container = self._container
        if _same(container, items):
            return ()
        name = _first_difference(container, items) if self._name == "_modules" else self._name
        is_state = not _adds_to_a_cache(items, container)
        container.clear()
        container.update(items) if isinstance(items, dict | set) else container.extend(items)
        return (Change(f"{self._path}{name}", self.number, is_state),)


class _LateBuffers(_Place):
    """The buffers that have no tensor before a call: those that no state dict has are caches, new in every call."""

    def __init__(self, path: str, module: torch.nn.Module):
        self._path, self._buffers, self._temporary = path, module._buffers, module._non_persistent_buffers_set

    def items(self) -> tuple[set[str], dict[str, None], set[str]]:
        """The names of those that have one, the others, and the names of those that no state dict has."""
        absent = {name: None for name, tensor in self._buffers.items() if tensor is None}
        return {*self._buffers} - {*absent}, absent, self._temporary.copy()

    def put_back(self, items: tuple[set[str], dict[str, None], set[str]]) -> Iterable[Change]:
        present, absent, temporary = items
        late = [name for name, x in self._buffers.items() if x is not None and name not in present]
        if not late:
            return ()
        changes = [Change(f"{self._path}{name}", self.number, name not in self._temporary) for name in late]
        for name in late:
            del self._buffers[name]
        self._buffers.update(absent)
        self._temporary.intersection_update(temporary)
        return changes


class _Script(_Place):
    """The attributes of a module of TorchScript that are no weights; lists come out of it as new ones each time."""

    def __init__(self, path: str, slots: ScriptSlots):
        self._path, self._slots = path, slots

    def items(self) -> dict[str, Any]:
        return self._slots.unregistered()

    def put_back(self, items: dict[str, Any]) -> Iterable[Change]:
        changed = [name for name, after in self.items().items() if not _is_as_before(items[name], after)]
        for name in changed:
            self._slots[name] = items[name]
        return [Change(f"{self._path}{name}", self.number, is_state=True) for name in changed]


def _is_as_before(before: Any, after: Any) -> bool:
    return before is after if isinstance(before, torch.Tensor) else repr(before) == repr(after)


class _Generator(_Place):
    """The numbers that come next out of one of Python's or NumPy's generators."""

    def __init__(self, path: str, name: str, generator: Any):
        self._name, self._generator = f"{path}{name}", generator

    def items(self) -> Any:
        return state_of(self._generator)

    def put_back(self, items: Any) -> Iterable[Change]:
        if is_same_state(items, state_of(self._generator)):
            return ()
        set_state(self._generator, items)
        return (Change(self._name, self.number, is_state=True),)


def _is(a: Any, b: Any) -> bool:
    """Whether two values are the very same; tuples in which weights are put and taken out are made anew."""
    return a is b or (isinstance(a, tuple) and type(a) is type(b) and len(a) == len(b) and all(map(_is, a, b)))


def _is_equal(before: Any, after: Any) -> bool:
    """Whether two plain values are the same."""
    return type(before) is type(after) and isinstance(after, bool | int | float | str) and before == after


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same items."""
    if len(a) != len(b) or isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_is, a.values(), b.values()))
    return all(map(_is, a, b))


def _adds_to_a_cache(before: Any, after: Any) -> bool:
    """Whether a forward pass has added to a dict what it computed, so that every call may do so anew."""
    if not isinstance(before, dict) or any(after.get(key, _ABSENT) is not value for key, value in before.items()):
        return False
    leaves = torch_pytree.tree_leaves([value for key, value in after.items() if key not in before])
    return not any(isinstance(leaf, bool | int | float | str) for leaf in leaves)


def _first_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    return next(name for name in a | b if a.get(name) is not b.get(name))


def _computed_by_hooks(module: torch.nn.Module) -> Iterator[str]:
    """Attributes that torch's own hooks (weight_norm, spectral_norm, pruning) write before each forward."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if type(hook).__module__.startswith("torch.nn.utils") and isinstance(name, str):
            yield name


def stray_tensors(
    module: torch.nn.Module, *, aliasing: Sequence[torch.Tensor] = (), fake: bool = False
) -> Iterator[str]:
    """Attributes, by dotted name, that hold tensors sharing memory with `aliasing`, or fake tensors."""
    storages = {storage_of(t) for t in aliasing if has_storage(t)}
    for name, tensor in _all_tensors(module):
        is_stray = fake and isinstance(tensor, FakeTensor)
        if is_stray or (has_storage(tensor) and storage_of(tensor) in storages):
            yield name


def _all_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors_of(module)
    for path, submodule in module.named_modules():
        for held in (submodule._parameters, submodule._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor
