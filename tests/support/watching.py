"""Watching what torch computes: which calls and which ops run on values, not on the fake tensors of a fake run."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder:
    """A torch function that notes the shapes it is called with, each time it computes and each time it is traced."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self.computed: list[Any] = []
        self.traced: list[Any] = []

    def __call__(self, *tensors: torch.Tensor) -> Any:
        shapes = tuple(tuple(x.shape) for x in tensors)
        fake = any(is_fake(x) for x in tensors)
        (self.traced if fake else self.computed).append(shapes[0] if len(shapes) == 1 else shapes)
        return self._function(*tensors)


class OpLog:
    """The aten ops that compute on values inside the functions it wraps, on whichever thread they run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()
        """Shapes of everything computed."""

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its ops logged; dispatch modes are per thread, so each call enters its own."""

        def logged(*args: Any, **kwargs: Any) -> Any:
            with _Mode(self):
                return function(*args, **kwargs)

        return logged

    @property
    def matmuls(self) -> int:
        """How many matrix products ran, single or batched."""
        return sum(self.counts[op] for op in ("mm", "addmm", "bmm", "baddbmm"))


class _Mode(TorchDispatchMode):
    def __init__(self, log: OpLog):
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not any(is_fake(x) for x in tensors):
            self._log.counts[func.overloadpacket.__name__] += 1
            self._log.shapes.update(tuple(x.shape) for x in tensors)
        return out
