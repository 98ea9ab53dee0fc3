"""Pytrees across the two frameworks: containers torch knows become containers JAX knows."""

from collections.abc import Callable
from typing import Any

import jax
import torch.utils._pytree as torch_pytree

IsLeaf = Callable[[Any], bool]


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
    return type(leaf) in torch_pytree.SUPPORTED_NODES


def _register(cls: type, node: Any) -> None:
    def flatten(value: Any) -> tuple[tuple[Any, ...], _Context]:
        children, context = node.flatten_fn(value)
        return tuple(children), _Context(context)

    def unflatten(context: _Context, children: Any) -> Any:
        return node.unflatten_fn(list(children), context.value)

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
