"""Skeletons: torch modules without weights, one per running call."""

import collections
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ...interop.calls.scope import Loan
from .attributes import Attributes, Values, put_back
from .copying import Copier
from .gradient_hooks import hooked, hooks_of
from .places import Alias, Place, StandIn, scattered
from .recurrent import join_weights
from .scripted import ScriptSlots


class Skeleton:
    """A module whose weights are put in and taken out again for each call.

    `load` does what `torch.func.functional_call` does, assign to `_parameters` and `_buffers`, through a table of the
    places of each weight (a tied one has several), in a tenth of a microsecond instead of seven per weight.

    **Arguments:**

    - `module`: without weights; meta tensors are in their places.
    - `aliases`: meta tensors in the place of views of weights.
    - `caches`: those of its functions, which are new in every call.
    - `is_scattered`: whether weights may be in other places than modules have for them.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        aliases: Mapping[torch.Tensor, Alias] | None = None,
        caches: Sequence[Any] = (),
        *,
        is_scattered: bool = False,
    ):
        self.module, self._caches, weights = module, caches, sorted(named_tensors(module))
        self._weights = [tensor for _, tensor in weights]
        self._loaded: Sequence[torch.Tensor] = self._weights
        index = {id(w): i for i, w in enumerate(self._weights)}
        self._places: list[Place] = [
            (index[id(tensor)], ScriptSlots(part) if isinstance(part, torch.jit.ScriptModule) else namespace, name)
            for part in module.modules()
            for namespace in (part._parameters, part._buffers)
            for name, tensor in namespace.items()
            if tensor is not None
        ]
        hooks = hooks_of(module)
        self._hooks = {i: hooks[name] for i, (name, _) in enumerate(weights) if name in hooks}
        self._others: list[Place] = []
        self._aliases: list[tuple[int, Alias, torch.Tensor, Any, Any]] = []
        if is_scattered:
            number_of = {name: i for i, (name, _) in enumerate(weights)}
            by_id = {id(meta): alias for meta, alias in (aliases or {}).items()}
            self._others, found = scattered(module, index, by_id)
            self._aliases = [(number_of[alias.weight], alias, meta, at, key) for alias, meta, at, key in found]

    @cached_property
    def attributes(self) -> Attributes:
        """Its other attributes; to be asked for before it runs."""
        return Attributes(self.module)

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put tensors in the places of the weights, sorted by name."""
        if self._hooks:
            tensors = [hooked(x, self._hooks[i]) if i in self._hooks else x for i, x in enumerate(tensors)]
        self._loaded = tensors
        for i, namespace, name in self._places:
            namespace[name] = tensors[i]
        for i, holder, key in self._others:
            holder[key] = tensors[i]
        for i, alias, _, holder, key in self._aliases:
            holder[key] = alias.of(tensors[i])

    def unload(self) -> dict[int, Any]:
        """Take the tensors out; what the forward put in the places of others, by number of the weight."""
        replaced: dict[int, Any] = {}
        for i, namespace, name in self._places:
            found = namespace.get(name)
            if found is not self._loaded[i]:
                replaced[i] = found
            namespace[name] = self._weights[i]
        for i, holder, key in self._others:
            if _present(holder, key, self._loaded[i]) is not self._loaded[i]:
                replaced.setdefault(i, None)
            else:
                holder[key] = self._weights[i]
        for _, _, meta, holder, key in self._aliases:
            holder[key] = meta
        for cache in self._caches:
            cache.cache_clear()
        self._loaded = self._weights
        return replaced

    def reset(self) -> None:
        """Take out whatever is in the places of the weights."""
        self.load(self._weights)


def _present(holder: Any, key: Any, otherwise: Any) -> Any:
    """What is in a place now, where that can be seen."""
    if isinstance(holder, list):
        return holder[key] if key < len(holder) else None
    return holder.get(key) if isinstance(holder, dict) else otherwise


class SkeletonPool:
    """Lends skeletons, a new copy whenever all are in use: with one module object, two threads would compute with
    each other's weights."""

    def __init__(
        self, skeleton: torch.nn.Module, stand_ins: Mapping[torch.Tensor, StandIn] | None = None, *, training: bool
    ):
        self._shared = {t: t for t in (*(t for _, t in named_tensors(skeleton)), *(stand_ins or ()))}
        self._aliases = {meta: s.alias for meta, s in (stand_ins or {}).items() if s.alias is not None}
        self._original = join_weights(in_mode(Copier(skeleton, self._shared).copied(), training=training))
        for part in self._original.modules():
            if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag):
                part.sparse = False  # JAX's gradients are dense
        self._free: collections.deque[Skeleton] = collections.deque()

    def borrow(self) -> Skeleton:
        """A skeleton for one call, to be given back."""
        try:
            return self._free.pop()
        except IndexError:
            copier = Copier(self._original, self._shared)
            return Skeleton(copier.copied(), self._aliases, copier.caches, is_scattered=copier.is_scattered)

    def give_back(self, skeleton: Skeleton) -> None:
        """Return a skeleton after the call."""
        self._free.append(skeleton)


class SkeletonLoan(Loan):
    """A skeleton that keeps the weights of a call for its backward pass (`interop/scope.py`)."""

    def __init__(self, pool: SkeletonPool, skeleton: Skeleton, tensors: Sequence[torch.Tensor], before: Values):
        self.skeleton, self.tensors = skeleton, tensors
        self._pool, self._before = pool, before

    def fits(self, lender: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is of that pool, with these very tensors."""
        return lender is self._pool and all(a is b for a, b in zip(self.tensors, tensors, strict=True))

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put weights in."""
        self.tensors = tensors
        self.skeleton.load(tensors)

    def empty(self) -> None:
        """Take them out, and what the backward pass left behind."""
        self.skeleton.unload()
        put_back(self._before)

    def end(self) -> None:
        """Give the skeleton back."""
        self._pool.give_back(self.skeleton)


def named_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers under torch's names; tied ones once."""
    return [*module.named_parameters(), *module.named_buffers()]


def in_mode(module: torch.nn.Module, *, training: bool) -> torch.nn.Module:
    """Put the module in training or evaluation mode; submodules set otherwise stay so if it already is."""
    return module if is_training(module) == training else module.train(training)


def is_training(module: torch.nn.Module) -> bool:
    """Whether the module is in training mode; frozen ones of TorchScript have none."""
    return getattr(module, "training", False)
