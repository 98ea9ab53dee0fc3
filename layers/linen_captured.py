"""A torch module taken apart for Linen: once, however often Linen clones a module or a compact method wraps it."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import torch

from ..interop.types import CallOptions
from .flax_collections import Collection, collections
from .module.cache import cached
from .module.functional_module import FunctionalModule


@dataclass(frozen=True)
class Captured:
    """A torch module taken apart, and how: what all clones that Linen makes of a module share."""

    source: torch.nn.Module
    key: Hashable
    module: FunctionalModule
    collections: dict[str, Collection] = field(compare=False)
    """Of each weight, by torch name."""

    @classmethod
    def of(cls, source: torch.nn.Module, options: CallOptions, channels_last: bool, rng_collection: str) -> "Captured":
        """The same for a module that was wrapped before with these options and has not changed since."""
        key = (options.key, channels_last, rng_collection)
        module = cached(source, (cls, key), lambda: _take_apart(source, options, channels_last, rng_collection))
        return cls(source, key, module, collections(module))

    def by_collection(self) -> dict[Collection, dict[str, None]]:
        """Collection to the torch names in it."""
        return {
            col: {name: None for name, c in self.collections.items() if c == col}
            for col in dict.fromkeys(self.collections.values())
        }

    def state_collections(self) -> list[Collection]:
        """Those that a forward may change."""
        return sorted({col for col in self.collections.values() if col in ("batch_stats", "buffers")})

    def has_method(self, name: str) -> bool:
        """Whether the torch module has a method by this name that is not one of every module."""
        found = None if hasattr(torch.nn.Module, name) else getattr(self.module.skeleton, name, None)
        return callable(found) and not isinstance(found, torch.nn.Module)


@dataclass(frozen=True)
class Tree:
    """A pytree that Flax takes as it is, and that can be compared and hashed."""

    leaves: list[Any]
    treedef: Any

    def __hash__(self) -> int:
        return hash((tuple(self.leaves), self.treedef))

    @property
    def tree(self) -> Any:
        """The pytree."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def _take_apart(
    module: torch.nn.Module, options: CallOptions, channels_last: bool, rng_collection: str
) -> FunctionalModule:
    made = FunctionalModule(
        module,
        remedy="",
        key_remedy=f'Pass `rngs={{"{rng_collection}": key}}` to `apply`',
        channels_last=channels_last,
        options=options,
    )
    mutable = sorted({col for col in collections(made).values() if col in ("batch_stats", "buffers")})
    made.remedy = (
        f"Call it with `apply(..., mutable={mutable})`, which gives `(output, updates)`; or in evaluation mode "
        "(`train=False`), in which layers like BatchNorm do not update.".replace("'", '"')
    )
    return made
