"""Forward mode: `torch.no_grad` within it, and threads.

torch lets tangents through `torch.no_grad`, but a JAX function has one derivative. So within a call, where
`torch.no_grad` stops gradients (straight-through estimators, power iteration, running scales), it stops tangents as
well.

The levels of forward mode are the process's: of two threads in it, the one that leaves takes the other's tangents.

Source: [forward-mode AD and no_grad](https://docs.pytorch.org/docs/stable/generated/torch.no_grad.html).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from ..internals.ops import SET_GRAD_ENABLED
from ..internals.switches import FORWARD_GRAD
from ..internals.transforms import JVP_TRANSFORM, transforms
from .function_modes import FunctionMode

_lock = threading.RLock()


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """Around forward mode: no other call of ours is in it meanwhile."""
    return _lock


def uses_forward_mode() -> bool:
    """Whether code that runs is within a level of forward mode."""
    return forward_ad._current_level >= 0


def in_forward_mode() -> bool:
    """Whether a `torch.func.jvp` is running."""
    return any(isinstance(transform, JVP_TRANSFORM) for transform in transforms())


@contextlib.contextmanager
def stopped_by_no_grad() -> Iterator[None]:
    """Where code within switches gradients off or on, tangents are, too."""
    is_enabled, enable = FORWARD_GRAD
    before = is_enabled()
    try:
        with torch.enable_grad(), _Follow():
            yield
    finally:
        enable(before)


class _Follow(FunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SET_GRAD_ENABLED:
            FORWARD_GRAD[1](args[0])
        return func(*args, **(kwargs or {}))
