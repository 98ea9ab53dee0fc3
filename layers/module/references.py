"""What Python objects hold, by name, and how to put something else there.

Functions hold what their cells and defaults do, so that a closure over a module counts as holding it.
"""

import functools
import itertools
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from .class_cache import once_per_class
from .scripted import ScriptSlots

ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, types.CodeType}
)
"""Types whose instances hold nothing."""


class Reference(NamedTuple):
    """One thing that holds another: `holder[key]` is `value`, and can be assigned to."""

    path: Any
    holder: Any
    key: Any
    value: Any

    @property
    def name(self) -> str:
        """The way from the object at the start, as one would write it."""
        return _written(self.path)


def references(root: Any, most: int = 100_000) -> Iterator[Reference]:
    """All that `root` leads to, up to so many objects; what several hold comes once for each of them."""
    seen: set[int] = set()
    waiting = [Reference(None, None, None, root)]
    while waiting and len(seen) < most:
        held = waiting.pop()
        list_parts = _parts_of(type(held.value))
        if list_parts is None:
            continue
        if not isinstance(held.value, _IMMUTABLE):
            if id(held.value) in seen:
                continue
            seen.add(id(held.value))
        for label, holder, key, value in list_parts(held.value, held):
            if type(value) not in ATOMS:
                found = Reference((held.path, label), holder, key, value)
                yield found
                waiting.append(found)


def _written(path: Any) -> str:
    labels = []
    while path is not None:
        path, label = path
        labels.append(label)
    return "".join(reversed(labels)).lstrip(".")


_Parts = Iterator[tuple[str, Any, Any, Any]]
_IMMUTABLE = (tuple, frozenset, types.MethodType)
_LEAVES = (
    *(torch.Tensor, torch.Generator, np.ndarray, np.generic, type, types.ModuleType, types.BuiltinFunctionType),
    *(property, weakref.ReferenceType, str, bytes, int, float),
)


@once_per_class
def _parts_of(cls: type) -> Callable[[Any, Reference], _Parts] | None:
    """How to list what instances of a class hold."""
    if issubclass(cls, _LEAVES) or cls in ATOMS:
        return None
    for base, list_parts in _KINDS.items():
        if issubclass(cls, base):
            return list_parts
    return _object if cls.__dictoffset__ or _slots(cls) else None


def _slots(cls: type) -> list[str]:
    named = (vars(base).get("__slots__", ()) for base in cls.__mro__)
    every = itertools.chain.from_iterable((names,) if isinstance(names, str) else names for names in named)
    return [name for name in every if name not in ("__dict__", "__weakref__")]


def _object(value: Any, held: Reference) -> _Parts:
    for name, item in list(getattr(value, "__dict__", {}).items()):
        if type(item) not in ATOMS:
            yield f".{name}", vars(value), name, item
    for name in _slots(type(value)):
        if hasattr(value, name):
            yield f".{name}", _Attributes(value), name, getattr(value, name)


def _module(value: torch.nn.Module, held: Reference) -> _Parts:
    if isinstance(value, torch.jit.ScriptModule):
        slots = ScriptSlots(value)
        yield from ((f".{name}", slots, name, x) for name, x in slots.unregistered().items())
    for name, item in list(vars(value).items()):
        if name in _OF_MODULES and isinstance(item, dict):
            yield from ((f".{k}", item, k, x) for k, x in list(item.items()))
        elif type(item) not in ATOMS and not (isinstance(item, dict | list | set) and not item):
            yield f".{name}", vars(value), name, item


_OF_MODULES = ("_modules", "_parameters", "_buffers")


# Classes derived from containers may count and list what they hold in a way of their own: these are asked as what they
# are derived from.


def _dict(value: dict[Any, Any], held: Reference) -> _Parts:
    keys = _Keys(value)
    for key, item in list(dict.items(value)):
        if type(key) not in ATOMS:
            yield f" (key {type(key).__name__})", keys, key, key
        yield f"[{key!r}]" if type(key) in ATOMS else f"[{type(key).__name__}]", value, key, item
    if isinstance(value, defaultdict):
        yield ".default_factory", _Attributes(value), "default_factory", value.default_factory
    if type(value).__dictoffset__:
        yield from _object(value, held)


def _list(value: list[Any], held: Reference) -> _Parts:
    for i, item in enumerate(list.__iter__(value)):
        yield f"[{i}]", value, i, item
    if type(value).__dictoffset__:
        yield from _object(value, held)


def _deque(value: deque[Any], held: Reference) -> _Parts:
    for i, item in enumerate(deque.__iter__(value)):
        yield f"[{i}]", value, i, item


def _tuple(value: tuple[Any, ...], held: Reference) -> _Parts:
    parts = _Rebuilt(held, lambda: list(tuple.__iter__(value)), lambda items: _like_tuple(value, items))
    for i, item in enumerate(tuple.__iter__(value)):
        yield f"[{i}]", parts, i, item


def _like_tuple(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    made = tuple.__new__(type(value), items)
    if type(value).__dictoffset__:
        vars(made).update(vars(value))
    return made


def _set(value: set[Any], held: Reference) -> _Parts:
    members = _Members(value)
    for item in list(set.__iter__(value)):
        yield f" (item {type(item).__name__})", members, item, item


def _frozenset(value: frozenset[Any], held: Reference) -> _Parts:
    items = list(frozenset.__iter__(value))
    parts = _Rebuilt(held, lambda: items, type(value))
    for i, item in enumerate(items):
        yield f" (item {type(item).__name__})", parts, i, item


def _method(value: types.MethodType, held: Reference) -> _Parts:
    parts = _Rebuilt(held, lambda: [value.__func__, value.__self__], lambda items: types.MethodType(*items))
    yield ".__func__", parts, 0, value.__func__
    yield ".__self__", parts, 1, value.__self__


def _partial(value: functools.partial[Any], held: Reference) -> _Parts:
    parts = _Partial(value)
    yield ".func", parts, 0, value.func
    yield ".args", parts, 1, value.args
    yield ".keywords", parts, 2, value.keywords
    yield from _object(value, held)


COMPILED_FROM = "_torchdynamo_orig_callable"
"""Where `torch.compile` notes what it compiled."""


def _function(value: types.FunctionType, held: Reference) -> _Parts:
    if COMPILED_FROM in vars(value):  # what else it holds is the compiler's
        yield " (compiled)", vars(value), COMPILED_FROM, vars(value)[COMPILED_FROM]
        return
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        if is_filled(cell):
            yield f" (its variable `{name}`)", _Cell(cell), name, cell.cell_contents
    for name in ("__defaults__", "__kwdefaults__"):
        if getattr(value, name):
            yield f".{name}", _Attributes(value), name, getattr(value, name)
    yield from _object(value, held)


def is_filled(cell: Any) -> bool:
    """Whether a cell of a closure has contents yet."""
    return cell != types.CellType()  # an empty one equals its like, and no other


_KINDS: dict[type, Callable[[Any, Reference], _Parts]] = {
    torch.nn.Module: _module,
    dict: _dict,
    list: _list,
    deque: _deque,
    tuple: _tuple,
    set: _set,
    frozenset: _frozenset,
    types.MethodType: _method,
    types.FunctionType: _function,
    functools.partial: _partial,
}


# --- holders of what is no dict or list: `holder[key] = value` assigns ------------------------------


class _Attributes:
    def __init__(self, owner: Any):
        self._owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)


class _Cell:
    def __init__(self, cell: Any):
        self._cell = cell

    def __setitem__(self, name: str, value: Any) -> None:
        self._cell.cell_contents = value


class _Partial:
    def __init__(self, partial: Any):
        self._partial = partial

    def __setitem__(self, part: int, value: Any) -> None:
        func, args, keywords, namespace = self._partial.__reduce__()[2]
        parts = [func, args, keywords]
        parts[part] = value
        self._partial.__setstate__((*parts, namespace))


class _Keys:
    """The keys of a dict; `key` is the one that was there at first."""

    def __init__(self, owner: dict[Any, Any]):
        self._owner, self._present = owner, dict[int, Any]()

    def __setitem__(self, key: Any, value: Any) -> None:
        present = self._present.get(id(key), key)
        items = [(value if k is present else k, v) for k, v in self._owner.items()]
        self._owner.clear()
        self._owner.update(items)
        self._present[id(key)] = value


class _Members:
    """The members of a set; `key` is the one that was there at first."""

    def __init__(self, owner: set[Any]):
        self._owner, self._present = owner, dict[int, Any]()

    def __setitem__(self, key: Any, value: Any) -> None:
        self._owner.discard(self._present.get(id(key), key))
        self._owner.add(value)
        self._present[id(key)] = value


class _Rebuilt:
    """The parts of something immutable, which is made anew and put where it is held."""

    def __init__(self, held: Reference, take_apart: Callable[[], list[Any]], make: Callable[[list[Any]], Any]):
        self._held, self._take_apart, self._make = held, take_apart, make
        self._parts: list[Any] | None = None

    def __setitem__(self, key: int, value: Any) -> None:
        self._parts = self._take_apart() if self._parts is None else self._parts
        self._parts[key] = value
        self._held.holder[self._held.key] = self._make(self._parts)
