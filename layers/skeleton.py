"""Skeletons: torch modules without weights, one per running call, left after each call as they were."""

import collections
import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

_ABSENT = object()


class Skeleton:
    """A module whose weights are put in and taken out again for each call.

    `load` does what `torch.func.functional_call` does, assign to `_parameters` and `_buffers`, through a table of the
    places of each weight (a tied one has several), in a tenth of a microsecond instead of seven per weight.
    """

    def __init__(self, module: torch.nn.Module, weights: Sequence[torch.Tensor]):
        self.module, self._weights = module, weights
        places: dict[int, list[tuple[dict[str, Any], str]]] = {id(w): [] for w in weights}
        for submodule in module.modules():
            for namespace in (submodule._parameters, submodule._buffers):
                for name, tensor in namespace.items():
                    if tensor is not None:
                        places[id(tensor)].append((namespace, name))
        self._places = [(i, *place) for i, w in enumerate(weights) for place in places[id(w)]]

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put tensors in the places of the weights."""
        for i, namespace, name in self._places:
            namespace[name] = tensors[i]

    def unload(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Take the tensors out; the name of one that the forward replaced by another, if any."""
        replaced = None
        for i, namespace, name in self._places:
            if namespace.get(name) is not tensors[i]:
                replaced = name
            namespace[name] = self._weights[i]
        return replaced


class SkeletonPool:
    """Lends skeletons, a new copy whenever all are in use: with one module object, two threads would compute with
    each other's weights."""

    def __init__(self, skeleton: torch.nn.Module, *, training: bool):
        self._original = in_mode(_copy(skeleton), training=training)
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
    with unset_fake_temporarily():  # else its other tensors would become fake when a trace needs a copy
        return copy_replacing(skeleton, {t: t for _, t in named_tensors(skeleton)})


def in_mode(module: torch.nn.Module, *, training: bool) -> torch.nn.Module:
    """Put the module in training or evaluation mode; submodules set otherwise stay so if it already is."""
    return module if module.training == training else module.train(training)


def attribute_values(module: torch.nn.Module, attributes: Iterable[tuple[str, str]]) -> list[tuple[dict, str, Any]]:
    """The present values of attributes given as (submodule prefix, name), for `put_back`."""
    held = [(vars(module.get_submodule(path.rstrip("."))), name) for path, name in attributes]
    return [(namespace, name, namespace.get(name, _ABSENT)) for namespace, name in held]


@contextlib.contextmanager
def assigned_attributes(module: torch.nn.Module) -> Iterator[list[tuple[str, str, Any, Any]]]:
    """Notes each attribute assigned meanwhile as (submodule prefix, name, before, after), and puts all back."""
    assigned: list[tuple[str, str, Any, Any]] = []
    namespaces = {f"{path}." if path else "": vars(m) for path, m in module.named_modules()}
    before = {path: dict(namespace) for path, namespace in namespaces.items()}
    try:
        yield assigned
    finally:
        for path, namespace in namespaces.items():
            for name in namespace.keys() | before[path].keys():
                old, new = before[path].get(name, _ABSENT), namespace.get(name, _ABSENT)
                if old is not new:
                    assigned.append((path, name, old, new))
                    put_back([(namespace, name, old)])


def stray_tensors(
    module: torch.nn.Module, *, aliasing: Sequence[torch.Tensor] = (), fake: bool = False
) -> Iterator[str]:
    """Attributes, by dotted name, that hold tensors sharing memory with `aliasing`, or fake tensors."""
    storages = {t.untyped_storage()._cdata for t in aliasing}
    for path, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            for leaf in torch_pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor) and (
                    (fake and isinstance(leaf, FakeTensor)) or leaf.untyped_storage()._cdata in storages
                ):
                    yield f"{path}.{name}" if path else name


def put_back(attributes: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
    """Give attributes the values they had."""
    for namespace, name, value in attributes:
        if value is _ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
