"""Skeletons: torch modules without weights, one per running call."""

import collections
import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .attributes import Attributes
from .recurrent import join_weights


class Skeleton:
    """A module whose weights are put in and taken out again for each call.

    `load` does what `torch.func.functional_call` does, assign to `_parameters` and `_buffers`, through a table of the
    places of each weight (a tied one has several), in a tenth of a microsecond instead of seven per weight.
    """

    def __init__(self, module: torch.nn.Module, weights: Sequence[torch.Tensor]):
        self.module, self._weights = module, weights
        index = {id(w): i for i, w in enumerate(weights)}
        self._places: list[tuple[int, dict[str, Any], str]] = [
            (index[id(tensor)], namespace, name)
            for submodule in module.modules()
            for namespace in (submodule._parameters, submodule._buffers)
            for name, tensor in namespace.items()
            if tensor is not None
        ]

    @cached_property
    def attributes(self) -> Attributes:
        """Its other attributes; to be asked for before it runs."""
        return Attributes(self.module)

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put tensors in the places of the weights."""
        for i, namespace, name in self._places:
            namespace[name] = tensors[i]

    def unload(self, tensors: Sequence[torch.Tensor]) -> dict[int, Any]:
        """Take the tensors out; what the forward put in the places of others, by number of the weight."""
        replaced: dict[int, Any] = {}
        for i, namespace, name in self._places:
            found = namespace.get(name)
            if found is not tensors[i]:
                replaced[i] = found
            namespace[name] = self._weights[i]
        return replaced

    def reset(self) -> None:
        """Take out whatever is in the places of the weights."""
        self.load(self._weights)


class SkeletonPool:
    """Lends skeletons, a new copy whenever all are in use: with one module object, two threads would compute with
    each other's weights."""

    def __init__(self, skeleton: torch.nn.Module, *, training: bool):
        self._original = join_weights(in_mode(_copy(skeleton), training=training))
        self._free: collections.deque[Skeleton] = collections.deque()

    def borrow(self) -> Skeleton:
        """A skeleton for one call, to be given back."""
        try:
            return self._free.pop()
        except IndexError:
            module = _copy(self._original)
            return Skeleton(module, [tensor for _, tensor in sorted(named_tensors(module))])

    def give_back(self, skeleton: Skeleton) -> None:
        """Return a skeleton after the call."""
        self._free.append(skeleton)


def named_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers under torch's names; tied ones once."""
    return [*module.named_parameters(), *module.named_buffers()]


def copy_replacing(module: torch.nn.Module, replacements: Mapping[torch.Tensor, torch.Tensor]) -> torch.nn.Module:
    """A deep copy of `module` with other tensors in the place of its own; ties stay ties."""
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    for submodule in module.modules():
        compiler = vars(submodule).get("dynamo_ctx")  # of torch.compile: shared, it finds what it compiled before
        memo[id(compiler)] = compiler
        for value in vars(submodule).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # as hook-based weight_norm leaves behind
                memo[id(value)] = value.detach()
    try:
        return copy.deepcopy(module, memo)
    except Exception as exc:
        raise TypeError(
            f"{type(module).__name__} cannot be copied with copy.deepcopy ({type(exc).__name__}: {exc}); torchleaf "
            "keeps a copy of the module without its weights. Remove the attribute that cannot be copied, or give its "
            "class a __deepcopy__."
        ) from exc


def _copy(skeleton: torch.nn.Module) -> torch.nn.Module:
    """A copy sharing the meta tensors, which hold nothing."""
    with _disable_current_modes():  # else its other tensors would become fake when a trace needs a copy
        return copy_replacing(skeleton, {t: t for _, t in named_tensors(skeleton)})


def in_mode(module: torch.nn.Module, *, training: bool) -> torch.nn.Module:
    """Put the module in training or evaluation mode; submodules set otherwise stay so if it already is."""
    return module if module.training == training else module.train(training)
