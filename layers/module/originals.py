"""What a copy of a module must not compute with: the user's own module, and what it was made of.

What leads to it past the module (a global, a class, an object of C++) still does so from the copy. Then the weights in
it would be constants, and their gradients zero; so an op that meets one while a call is traced is an error.
"""

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...interop.errors import ForeignTensorError, TorchCallError
from ...interop.values.memory import has_storage, storage_of
from .places import StandIn


class Originals:
    """The weights of the user's module, which may die."""

    def __init__(self, weights: Sequence[tuple[str, torch.Tensor]]):
        self._storages = {
            storage_of(tensor): (StorageWeakRef(tensor.untyped_storage()), name)
            for name, tensor in weights
            if has_storage(tensor)
        }

    def add(self, other: "Originals") -> None:
        """Know those of an equal module as well."""
        self._storages |= other._storages

    def named(self) -> dict[int, str]:
        """The names of those that are alive, by storage."""
        self._storages = {a: held for a, held in self._storages.items() if not held[0].expired()}
        return {address: name for address, (_, name) in self._storages.items()}


def refuse_foreign(
    name: str, error: ForeignTensorError, originals: Mapping[int, str], stand_ins: Mapping[torch.Tensor, StandIn]
) -> TorchCallError:
    """The error for a call that computes with a tensor that is none of its own, saying where it comes from."""
    stand_in = stand_ins.get(error.tensor)
    if stand_in is not None:
        return TorchCallError(
            f"{name} computes with its attribute `{stand_in.name}`, which {stand_in.why}: it would stay as it was, "
            "without gradients. Compute it in `forward`; or, if it is to be a constant, make it a buffer: "
            f'`register_buffer("{stand_in.name.rpartition(".")[2]}", value.detach())`.'
        )
    weight = error.what
    where = next(_ways(error, error.tensor), None)
    if storage_of(error.tensor) in originals:
        return TorchCallError(
            f"{name} computes with weight `{weight}` of the module that was wrapped, not with the one it is given"
            f"{_shown(where)}. torchleaf runs a copy of the module: what hangs on it (attributes, closures, hooks) is "
            "copied with it; globals, class attributes and objects of C++ are not. Reach the module through `self` "
            "there, or make it an attribute: `self.part = part` in `__init__`."
        )
    return TorchCallError(
        f"{name} computes with weight `{weight}` from a place where torchleaf cannot put the one it is given"
        f"{_shown(where)}. Reach it as an attribute of the module, `self.{weight}`."
    )


def _shown(where: str | None) -> str:
    return "" if where is None else f" ({where})"


def _ways(error: BaseException, tensor: torch.Tensor) -> Iterator[str]:
    """By which names the frames of an error reach a tensor: the innermost frame outside of torch comes first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [f for f in reversed(frames) if not _is_library(f)]
    for frame in own:
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        for kind, name, value in _names(frame):
            if _has(value, tensor):
                yield f"through the {kind} `{name}` in {frame.f_code.co_name}, {line}"
    if own:
        yield f"in {own[0].f_code.co_name}, {own[0].f_code.co_filename}:{own[0].f_lineno}"


def _is_library(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("torch", __name__.partition(".")[0])


def _names(frame: FrameType) -> Iterator[tuple[str, str, Any]]:
    code = frame.f_code
    for name in code.co_freevars:
        yield "closure variable", name, frame.f_locals.get(name)
    for name in code.co_names:
        if name in frame.f_globals:
            yield "global", name, frame.f_globals[name]
        owner = type(frame.f_locals.get("self"))
        found = inspect.getattr_static(owner, name, None)
        if isinstance(found, torch.nn.Module | torch.Tensor | list | dict):
            yield "class attribute", name, found


def _has(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a value is the tensor, or a module or container with it."""
    if isinstance(value, list | tuple):
        return any(_has(x, tensor) for x in value)
    if isinstance(value, dict):
        return any(_has(x, tensor) for x in value.values())
    if isinstance(value, torch.nn.Module):
        return any(_has(x, tensor) for x in (*value.parameters(), *value.buffers()))
    return isinstance(value, torch.Tensor) and has_storage(value) and storage_of(value) == storage_of(tensor)
