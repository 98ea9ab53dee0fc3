"""Records: objects whose attributes are their whole state, as containers of JAX.

These are dataclasses and the key-value caches of transformers. Other objects that hold tensors (modules, generators,
distributions) are left alone: what their attributes mean, and whether they may be rebuilt, only they know.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import GetAttrKey

_CHILDREN = "_torchleaf_children"
_PLAIN = (
    *(bool, int, float, complex, str, bytes, Enum, torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype),
    *(type, types.FunctionType, types.BuiltinFunctionType),
)


@functools.lru_cache(maxsize=1024)
def is_record(cls: type) -> bool:
    """Whether attributes are the whole state of the instances of `cls`, so that they can be rebuilt from them."""
    plain = cls.__new__ is object.__new__ and not issubclass(cls, torch.nn.Module)
    return plain and (dataclasses.is_dataclass(cls) or is_cache(cls))


@functools.lru_cache(maxsize=1024)
def is_cache(cls: type) -> bool:
    """Whether it is one of transformers' caches or their layers, of which calls make new ones or fill given ones."""
    return any(base.__module__ == "transformers.cache_utils" for base in cls.__mro__)


def attributes(record: Any) -> dict[str, Any]:
    """The attributes by name, in an order that does not depend on when they were set: declared fields come first."""
    state: Any = object.__getstate__(record)
    namespace, slots = state if isinstance(state, tuple) else (state, None)
    values = {**(namespace or {}), **(slots or {})}
    values.pop(_CHILDREN, None)
    declared = [f.name for f in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []
    return {n: values[n] for n in [*declared, *sorted(values.keys() - set(declared))] if n in values}


class _Statics:
    """What is left of a record without its children; compared by value, as JAX requires of static data."""

    def __init__(self, children: tuple[str, ...], leaves: list[Any], treedef: Any):
        self.children, self._leaves, self._treedef = children, leaves, treedef
        self._key = (children, treedef, tuple(map(_key, leaves)))

    def values(self) -> dict[str, Any]:
        """The static attributes, their containers made anew, so that no two records share them."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Statics) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return ", ".join([*self.children, *(f"{name}={value!r}" for name, value in self.values().items())])


def register_record(cls: Any, flatten: Callable[[Any], tuple[list[Any], Any]]) -> None:
    """Register a record class with JAX; `flatten` is for the values of its attributes.

    Attributes with nothing but plain values in them are static; the others are children. What was once a child stays
    one in the records JAX rebuilds, where anything may stand for an array: specs of booleans, axes, None. Without a
    `__dict__` to note that in, all attributes are children.
    """
    remembers = cls.__dictoffset__ != 0

    def split(record: Any) -> tuple[dict[str, Any], _Statics]:
        values, children, statics = attributes(record), {}, {}
        remembered = vars(record).get(_CHILDREN, ()) if remembers else values
        for name, value in values.items():
            is_plain = isinstance(value, _PLAIN) or all(isinstance(x, _PLAIN) for x in flatten(value)[0])
            (children if name in remembered or not is_plain else statics)[name] = value
        return children, _Statics(tuple(children), *flatten(statics))

    def flatten_with_keys(record: Any) -> tuple[list[tuple[Any, Any]], _Statics]:
        children, statics = split(record)
        return [(GetAttrKey(name), child) for name, child in children.items()], statics

    def flatten_values(record: Any) -> tuple[list[Any], _Statics]:
        children, statics = split(record)
        return list(children.values()), statics

    def unflatten(statics: _Statics, children: Iterable[Any]) -> Any:
        record = object.__new__(cls)
        for name, value in (statics.values() | dict(zip(statics.children, children, strict=True))).items():
            object.__setattr__(record, name, value)
        if remembers:
            vars(record)[_CHILDREN] = statics.children
        return record

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten_values)


def _key(value: Any) -> Any:
    """Tells apart what `==` does not: 1, 1.0 and True; 0.0 and -0.0."""
    return (type(value), repr(value) if isinstance(value, float | complex) else value)
