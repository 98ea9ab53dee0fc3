"""Runs of a callable that may do what no observation showed: it reads values, and others may lead it elsewhere.

Its operands are XLA's memory, which must not change. So a run is watched: a write into an operand is seen before it
happens, and the run starts again with a copy of that operand, as all later ones do. Code that leaves torch, or that
torch compiles, is not seen: it gets copies of all.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..internals.fake import FakeTensor, without_modes
from ..internals.transforms import transforms
from ..values.memory import has_storage, storage_of
from .aten import STATISTICS, bound, written
from .dispatch import Mode
from .function_modes import FunctionMode
from .random import draws, refuse

EXPOSING = frozenset(
    {"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__dlpack__", "to_dlpack"}
)
"""Methods of tensors that hand out their memory, past torch's dispatcher."""


class WouldWrite(BaseException):
    """A run is about to write into an operand. No `except Exception` of the callable catches it."""


class Guard(Mode):
    """Within it, a write into `protected` memory, storages of operands by number, raises `WouldWrite` instead.

    Drawing random numbers is an error, unless there is no remedy for a missing key because there is one.
    """

    def __init__(self, protected: Mapping[int, int], name: str, key_remedy: str | None):
        super().__init__()
        self.operand: int | None = None
        """The operand that was about to be written, also if torch or the callable made another error of it."""
        self.is_exposed = False
        """Whether its memory was about to be handed out, which may mean to be written."""
        self._protected = protected
        self._exposure = Exposure(self._note_exposure) if protected else contextlib.nullcontext()
        self._name, self._key_remedy = name, key_remedy

    def __enter__(self) -> "Guard":
        self._exposure.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._exposure.__exit__(*exc)

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        writes, may_draw = _kind(func)
        if writes:
            self.check(written(func, bound(func, args, kwargs)))
        if may_draw and self._key_remedy is not None and draws(func, bound(func, args, kwargs)):
            raise refuse(self._name, func, self._key_remedy)
        return func(*args, **kwargs)

    def check(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raise if one of them is protected."""
        operands = [self._protected.get(storage_of(x)) for x in filter(has_storage, tensors)]
        self.operand = next((i for i in operands if i is not None), self.operand)
        if self.operand is not None:
            raise WouldWrite

    def _note_exposure(self, tensors: Iterable[torch.Tensor]) -> None:
        try:
            self.check(tensors)
        except WouldWrite:
            self.is_exposed = True
            raise


class Exposure(FunctionMode):
    """Within it, `seen` is called with tensors whose memory is about to be handed out, and `listed` with the values of
    tensors that were made lists."""

    def __init__(
        self,
        seen: Callable[[Iterable[torch.Tensor]], None],
        listed: Callable[[torch.Tensor, Any], None] | None = None,
    ):
        super().__init__()
        self._seen, self._listed = seen, listed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in EXPOSING:
            self._seen(x for x in args if isinstance(x, torch.Tensor))
        output = func(*args, **kwargs) if kwargs else func(*args)
        if self._listed is not None and func is torch.Tensor.tolist:
            self._listed(args[0], output)
        return output


@functools.cache
def _kind(op: Any) -> tuple[bool, bool]:
    """Whether an op writes into an argument, and whether it draws, with some arguments at least."""
    writes = op._schema.is_mutable or any(argument.name in STATISTICS for argument in op._schema.arguments)
    return writes, torch.Tag.nondeterministic_seeded in op.tags


def is_plain_run(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a run is one on values, and outermost: within transforms of torch's, operands have no memory to watch."""
    return not (transforms() or any(isinstance(x, FakeTensor) for x in tensors))


def changed(before: torch.Tensor, after: Any) -> bool:
    """Whether what stands in a tensor's place has another value, whatever mode is on."""
    if after is before:
        return False
    if not isinstance(after, torch.Tensor) or (after.shape, after.dtype) != (before.shape, before.dtype):
        return True
    with without_modes(), torch.no_grad():
        return not torch.equal(before, after) and not _same_with_nan(before, after)


def _same_with_nan(before: torch.Tensor, after: torch.Tensor) -> bool:
    return bool(((before == after) | ((before != before) & (after != after))).all())
