"""`torch.no_grad` in forward mode: torch lets tangents through, but a JAX function has one derivative.

So within a call, where `torch.no_grad` stops gradients (straight-through estimators, power iteration, running scales),
it stops tangents as well.

Source: [forward-mode AD and no_grad](https://docs.pytorch.org/docs/stable/generated/torch.no_grad.html).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._functorch import pyfunctorch
from torch.overrides import TorchFunctionMode


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


class _Follow(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return func(*args, **(kwargs or {}))
