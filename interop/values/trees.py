"""Pytrees across the two frameworks: containers and records JAX has not met become containers JAX knows."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import GetAttrKey, SequenceKey

from ..internals.ops import torch_pytree
from . import packed_sequence
from .records import attributes, is_cache, is_record, register_record

_ARRAYS = (torch.Tensor, jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_registered: set[type] = set()
_registering = threading.RLock()

packed_sequence.register()  # first of all: JAX would take a PackedSequence for a plain named tuple


def flatten_registering(tree: Any, *, every_record: bool = False) -> tuple[list[Any], Any]:
    """`jax.tree.flatten`, after registering with JAX each class in `tree` that holds arrays and that JAX has not met.

    These are the containers torch knows (transformers registers its `ModelOutput` classes, and torch its
    `return_types`, as torch pytrees) and records (`records.py`). They are then usable as arguments and outputs of
    jitted functions. A hashable dataclass without arrays is a static value and stays a leaf, except with
    `every_record`: what a torch callable returns must have one structure, whether or not it holds arrays.
    """
    return _flatten(tree, every_record, ())


def _flatten(tree: Any, every_record: bool, within: tuple[int, ...]) -> tuple[list[Any], Any]:
    while True:
        leaves, treedef = jax.tree.flatten(tree)
        foreign = {type(leaf) for leaf in leaves if _is_container(leaf, every_record, within)}
        if not foreign:
            return leaves, treedef
        for cls in foreign:
            _register(cls)


class _Context:
    """torch's pytree context made hashable, as JAX requires of static data.

    Contexts (lists of field names, a class) compare by value but need not hash.
    """

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.value == other.value

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


def _is_container(leaf: Any, every_record: bool, within: tuple[int, ...]) -> bool:
    """Whether JAX should look into a leaf; `within` are the records around it, to which it may refer back."""
    cls = type(leaf)
    if cls in torch_pytree.SUPPORTED_NODES:
        return cls is not torch.Size
    if not is_record(cls) or id(leaf) in within:
        return False
    return every_record or is_cache(cls) or cls.__hash__ is None or _holds_arrays(leaf, (*within, id(leaf)))


def _holds_arrays(record: Any, within: tuple[int, ...]) -> bool:
    return any(isinstance(leaf, _ARRAYS) for leaf in _flatten(attributes(record), False, within)[0])


def _flatten_attributes(value: Any) -> tuple[list[Any], Any]:
    return flatten_registering(value, every_record=True)


def _register(cls: type) -> None:
    with _registering:
        if cls in _registered:  # by another thread
            return
        if is_record(cls) and (is_cache(cls) or cls not in torch_pytree.SUPPORTED_NODES):
            register_record(cls, _flatten_attributes)
        else:
            _register_torch_container(cls, torch_pytree.SUPPORTED_NODES[cls])
        _registered.add(cls)


def _register_torch_container(cls: type, node: Any) -> None:
    """Register with JAX a class that torch knows how to flatten."""
    is_model_output = dataclasses.is_dataclass(cls) and issubclass(cls, OrderedDict)  # of transformers

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        children, context = node.flatten_fn(value)
        keys = [GetAttrKey(k) for k in value] if is_model_output else [SequenceKey(i) for i, _ in enumerate(children)]
        return list(zip(keys, children, strict=True)), _Context(context)

    def unflatten(context: _Context, children: Iterable[Any]) -> Any:
        if is_model_output:
            return _model_output(cls, context.value, children)
        return node.unflatten_fn(list(children), context.value)

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


def _model_output(cls: Any, keys: Iterable[str], values: Iterable[Any]) -> Any:
    """Build an output record without its constructor, which inspects values and drops None: JAX puts anything there."""
    record = cls.__new__(cls)
    OrderedDict.__init__(record)
    for field in dataclasses.fields(cls):
        object.__setattr__(record, field.name, None)
    for key, value in zip(keys, values, strict=True):
        OrderedDict.__setitem__(record, key, value)
        object.__setattr__(record, key, value)
    return record
