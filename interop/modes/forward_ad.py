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
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad

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
    interpreters = pyfunctorch.retrieve_all_functorch_interpreters()
    return any(isinstance(i, pyfunctorch.JvpInterpreter) for i in interpreters)


@contextlib.contextmanager
def stopped_by_no_grad() -> Iterator[None]:
    """Where code within switches gradients off or on, tangents are, too."""
    enabled = torch._C._is_fwd_grad_enabled()
    try:
        with torch.enable_grad(), _Follow():
            yield
    finally:
        torch._C._set_fwd_grad_enabled(enabled)


class _Follow(FunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return func(*args, **(kwargs or {}))
