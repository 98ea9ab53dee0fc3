"""Pytrees across the two frameworks: containers torch knows become containers JAX knows."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import torch
import torch.utils._pytree as torch_pytree
from jax.tree_util import GetAttrKey, SequenceKey


def flatten_registering(tree: Any) -> tuple[list[Any], Any]:
    """`jax.tree.flatten`, after registering with JAX each container class only torch knows.

    transformers registers its `ModelOutput` classes, and torch its `return_types`, as torch
    pytrees; taking over those registrations makes them usable as outputs of jitted functions.
    """
    while True:
        leaves, treedef = jax.tree.flatten(tree)
        foreign = {type(leaf) for leaf in leaves if _is_torch_container(leaf)}
        if not foreign:
            return leaves, treedef
        for cls in foreign:
            _register(cls, torch_pytree.SUPPORTED_NODES[cls])


def leaf_names(tree: Any) -> list[str]:
    """Names for the leaves of `tree`, as a user would write them: `[0]['weight']`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


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


def _is_torch_container(leaf: Any) -> bool:
    return type(leaf) in torch_pytree.SUPPORTED_NODES and type(leaf) is not torch.Size


def _register(cls: type, node: Any) -> None:
    """Register with JAX a class that torch knows how to flatten."""
    is_record = dataclasses.is_dataclass(cls) and issubclass(cls, OrderedDict)  # transformers' ModelOutput

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        children, context = node.flatten_fn(value)
        keys = [GetAttrKey(k) for k in value] if is_record else [SequenceKey(i) for i, _ in enumerate(children)]
        return list(zip(keys, children, strict=True)), _Context(context)

    def unflatten(context: _Context, children: Iterable[Any]) -> Any:
        if is_record:
            return _record(cls, context.value, children)
        return node.unflatten_fn(list(children), context.value)

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


def _record(cls: Any, keys: Iterable[str], values: Iterable[Any]) -> Any:
    """Build an output record without its constructor, which inspects values and drops None: JAX puts anything there."""
    record = cls.__new__(cls)
    OrderedDict.__init__(record)
    for field in dataclasses.fields(cls):
        object.__setattr__(record, field.name, None)
    for key, value in zip(keys, values, strict=True):
        OrderedDict.__setitem__(record, key, value)
        object.__setattr__(record, key, value)
    return record
