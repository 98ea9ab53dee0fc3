"""A pytree taken apart for torch: arrays by name, each once, and all the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


class Leaves:
    """The leaves of a pytree: `arrays` by their names, `trainable` which of them are parameters.

    A leaf that is an array met before is the same one, by its first name; `aliases` has the others. Typed PRNG keys
    are among the arrays as their data. `is_trainable` is a pytree of the same structure.
    """

    def __init__(self, tree: Any, is_trainable: Any, prefix: str = ""):
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        marks = jax.tree.leaves(is_trainable)
        self.arrays: dict[str, jax.Array] = {}
        self.trainable: set[str] = set()
        self.aliases: dict[str, str] = {}
        self._statics: list[Any] = []
        self._names: list[str | None] = []
        """The array that each leaf is, or None for a static one."""
        self._keys: dict[str, str] = {}
        known: dict[int, str] = {}
        for (path, leaf), is_parameter in zip(paths, marks, strict=True):
            is_array = isinstance(leaf, jax.Array)
            self._statics.append(None if is_array else leaf)
            if not is_array:
                self._names.append(None)
                continue
            name = prefix + path_name(path)
            if known.setdefault(id(leaf), name) != name:
                self.aliases[name] = known[id(leaf)]
                self._names.append(known[id(leaf)])
                continue
            if name in self.arrays:
                raise ValueError(f"JaxModule: two leaves of the model are both named {name!r}. Rename one of them.")
            self._names.append(name)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                self._keys[name], leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
            self.arrays[name] = leaf
            if is_parameter:
                self.trainable.add(name)

    def tree(self, arrays: Mapping[str, Any]) -> Any:
        """The pytree with other arrays."""
        values = {
            name: jax.random.wrap_key_data(x, impl=self._keys[name]) if name in self._keys else x
            for name, x in arrays.items()
        }
        leaves = [s if n is None else values[n] for n, s in zip(self._names, self._statics, strict=True)]
        return jax.tree.unflatten(self._treedef, leaves)

    def changed(self, tree: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a pytree of the same structure that are not those of `arrays`, which it was made of."""
        found = {}
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self._treedef:
            raise ValueError(f"JaxModule: the state that the model returned is another pytree than before: {treedef}.")
        for name, leaf in zip(self._names, leaves, strict=True):
            if name is not None and leaf is not arrays[name]:
                found[name] = jax.random.key_data(leaf) if name in self._keys else leaf
        return {name: x for name, x in found.items() if name not in self._keys}


def path_name(path: Sequence[Any]) -> str:
    """A path as torch writes names: `layers.0.weight`."""
    return ".".join(map(_part, path)) or "value"


def _part(key: Any) -> str:
    match key:
        case GetAttrKey():
            return key.name
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
    return str(key)


def everywhere(mark: bool, tree: Any) -> Any:
    """The same mark for each leaf."""
    return jax.tree.map(lambda leaf: mark, tree)
