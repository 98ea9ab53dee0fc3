"""Watching what torch computes: which calls and which ops run on values, not on the fake tensors of a trial run."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode


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


class OpCounter(TorchDispatchMode):
    """Counts the aten ops that compute on values while it is entered, and notes the shapes they give."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not any(is_fake(x) for x in tensors):
            self.counts[func.overloadpacket.__name__] += 1
            self.shapes.update(tuple(x.shape) for x in tensors)
        return out
