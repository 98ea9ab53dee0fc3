"""Where a module has its weights, beside `_parameters` and `_buffers`, and tensors that hang together with them.

A weight may be in a list, an object or a closure as well: there a call's tensors are put, too. A plain attribute may be
another view of its memory (`self.w.data`, `self.w.t()`): it is derived anew from a call's tensor. What was computed
from weights when the module was made stays behind; a tensor without data stands in for it, so that it cannot be used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...interop.values.memory import has_storage, storage_of
from .references import references


@dataclass(frozen=True)
class Alias:
    """A view of a weight's memory, by which it can be derived from another tensor of the weight's shape."""

    weight: str
    order: tuple[int, ...]
    """The weight's axes in the order of its memory."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    has_gradient: bool

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The same view of another tensor."""
        memory = weight.permute(self.order).reshape(-1)
        view = memory.as_strided(self.size, self.stride, memory.storage_offset() + self.offset)
        return view if self.has_gradient else view.detach()


@dataclass(frozen=True)
class StandIn:
    """A tensor that a module has beside its weights and because of them."""

    name: str
    why: str
    """What it has to do with weights."""
    alias: Alias | None
    value: torch.Tensor | None
    """What it was, if it is no alias."""

    def of(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor that belongs to a module of these weights."""
        if self.alias is not None:
            return self.alias.of(weights[self.alias.weight])
        assert self.value is not None
        return self.value


class StandIns:
    """Finds the tensors of a module that hang together with its weights."""

    def __init__(self, weights: Sequence[tuple[str, torch.Tensor]]):
        self._weights = {id(tensor): (name, tensor) for name, tensor in weights}
        self._by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in weights:
            if has_storage(tensor):
                self._by_storage.setdefault(storage_of(tensor), []).append((name, tensor))
        self.made: dict[torch.Tensor, StandIn] = {}
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor, name: Callable[[], str]) -> torch.Tensor | None:
        """What stands in for a tensor, if it has to do with weights."""
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        sharing = self._by_storage.get(storage_of(tensor), ()) if has_storage(tensor) else ()
        computed = next(self._computed_from(tensor), None)
        aliases = (_alias(n, w, tensor, has_gradient=computed is not None) for n, w in sharing)
        alias = next((a for a in aliases if a is not None), None)
        if alias is not None or computed is not None:
            why = f"was computed from weight `{computed}` when the module was made"
        else:
            names = [name for name, weight in sharing if isinstance(weight, torch.nn.Parameter)]
            if not names:
                return None
            why = f"shares the memory of weight `{names[0]}` in a way that cannot be derived from other values of it"
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        value = tensor.detach().clone() if alias is None else None
        self.made[meta] = StandIn(name(), why, alias, value)
        self._known[id(tensor)] = tensor, meta
        return meta

    def _computed_from(self, tensor: torch.Tensor) -> Iterator[str]:
        seen: set[Any] = set()
        nodes = [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if id(leaf) in self._weights:
                yield self._weights[id(leaf)][0]
            nodes += [following for following, _ in node.next_functions]


def _alias(name: str, weight: torch.Tensor, tensor: torch.Tensor, *, has_gradient: bool) -> Alias | None:
    """A tensor as a view of a weight, if it lies within it and is of its dtype."""
    order = tuple(sorted(range(weight.ndim), key=lambda axis: (-weight.stride(axis), axis)))
    is_plain = not (tensor.is_conj() or tensor.is_neg() or weight.is_conj() or weight.is_neg())
    offset = int(tensor.storage_offset()) - int(weight.storage_offset())
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.dtype != weight.dtype or not is_plain or not weight.permute(order).is_contiguous():
        return None
    if offset < 0 or (tensor.numel() and offset + reach >= weight.numel()):
        return None
    return Alias(name, order, tuple(tensor.shape), tensor.stride(), offset, has_gradient)


Place = tuple[int, Any, Any]
"""The number of a weight and where it is: `holder[key]`."""


def scattered(
    module: torch.nn.Module, numbers: Mapping[int, int], aliases: Mapping[int, Alias]
) -> tuple[list[Place], list[tuple[Alias, torch.Tensor, Any, Any]]]:
    """The places of weights, beside those where modules register them, and of their aliases.

    `numbers` are those of the weights, by the tensor's `id`; `aliases` are those of stand-ins, likewise.
    """
    registered = {
        id(namespace) for part in module.modules() for namespace in (part._parameters, part._buffers) if namespace
    }
    places, derived = [], []
    for found in references(module):
        if not isinstance(found.value, torch.Tensor) or id(found.holder) in registered:
            continue
        if id(found.value) in numbers:
            places.append((numbers[id(found.value)], found.holder, found.key))
        elif id(found.value) in aliases:
            derived.append((aliases[id(found.value)], found.value, found.holder, found.key))
    return places, derived
