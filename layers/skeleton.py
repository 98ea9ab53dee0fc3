"""Skeletons: torch modules without weights, one per running call, left after each call as they were."""

import collections
import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

_ABSENT = object()


class SkeletonPool:
    """Lends skeletons, a new copy whenever all are in use: torch swaps weights inside the module object,
    so two threads in one module would compute with each other's weights."""

    def __init__(self, skeleton: torch.nn.Module, *, training: bool):
        self._original = in_mode(_copy(skeleton), training=training)
        self._free: collections.deque[torch.nn.Module] = collections.deque()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[torch.nn.Module]:
        """A skeleton for the duration of one call."""
        try:
            skeleton = self._free.pop()
        except IndexError:
            skeleton = _copy(self._original)
        try:
            yield skeleton
        finally:
            self._free.append(skeleton)


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
    weights = [*skeleton.parameters(), *skeleton.buffers()]
    with unset_fake_temporarily():  # else its other tensors would become fake when a trace needs a copy
        return copy_replacing(skeleton, {t: t for t in weights})


def in_mode(module: torch.nn.Module, *, training: bool) -> torch.nn.Module:
    """Put the module in training or evaluation mode; submodules set otherwise stay so if it already is."""
    return module if module.training == training else module.train(training)


@contextlib.contextmanager
def keep_attributes(
    module: torch.nn.Module, attributes: Sequence[tuple[str, str]] | set[tuple[str, str]]
) -> Iterator[None]:
    """Put the named attributes, as (submodule prefix, name), back as they were."""
    held = [(vars(module.get_submodule(path.rstrip("."))), name) for path, name in attributes]
    before = [(namespace, name, namespace.get(name, _ABSENT)) for namespace, name in held]
    try:
        yield
    finally:
        _put_back(before)


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
                    _put_back([(namespace, name, old)])


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


def _put_back(attributes: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
    for namespace, name, value in attributes:
        if value is _ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
