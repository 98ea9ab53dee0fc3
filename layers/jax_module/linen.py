"""Flax Linen modules and their variables as torch modules."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from flax import linen as nn

from .kinds import Kind, takes
from .leaves import Leaves, everywhere

_MODES = {
    "deterministic": lambda training: not training,
    "use_running_average": lambda training: not training,
    "train": lambda training: training,
    "training": lambda training: training,
    "is_training": lambda training: training,
}
"""The arguments by which modules are told the mode, and what they are in it."""


class LinenKind(Kind):
    """A Linen module: `params` are parameters, the other collections buffers, which a call may change."""

    def __init__(self, module: nn.Module, variables: Mapping[str, Any]):
        if not isinstance(variables, Mapping):
            raise TypeError(f"JaxModule: variables is {variables!r}; give what `module.init` returned.")
        self._module, self.name = module, type(module).__qualname__
        self._collections: dict[str, Leaves] = {}
        for collection, values in variables.items():
            marks = jax.tree.map(eqx.is_inexact_array, values) if collection == "params" else everywhere(False, values)
            self._collections[collection] = Leaves(values, marks, "" if collection == "params" else f"{collection}.")
        self.arrays, self.aliases = {}, {}
        for leaves in self._collections.values():
            self.arrays |= leaves.arrays
            self.aliases |= leaves.aliases
        params = self._collections.get("params")
        self.trainable = frozenset(params.trainable if params else ())
        self.stateful = frozenset(self.arrays) - frozenset(params.arrays if params else ())
        self._modes = [name for name in _MODES if takes(type(module).__call__, name)]

    def forget(self) -> None:
        super().forget()
        for leaves in self._collections.values():
            leaves.arrays = {}

    def call(
        self, arrays: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        modes = {name: _MODES[name](training) for name in self._modes}
        mutable = [collection for collection in self._collections if collection != "params"]
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}  # others that are asked for come of `params`
        out, new = self._module.apply(self.model(arrays)[1], *args, rngs=rngs, mutable=mutable, **{**modes, **kwargs})
        updates = {}
        for collection in mutable:
            updates |= self._collections[collection].changed(new[collection], arrays)
        return out, updates

    def model(self, arrays: Mapping[str, jax.Array]) -> Any:
        return self._module, {collection: leaves.tree(arrays) for collection, leaves in self._collections.items()}
