"""Callables that differentiate by their own operands: gradient penalties by a weight, test-time training.

In torch a parameter requires gradients wherever it is used, and code may rely on that, or ask for it
(`if weight.requires_grad`). The operands of a call require them only where JAX differentiates by them. So a callable
that fails for want of gradients, or that does something else where parameters have them, gets such operands always.
"""

import os
import sys
from types import FrameType
from typing import Any

import torch

from ..wording import says_no_gradient_required
from .function_modes import FunctionMode

_GETTER = torch.Tensor.requires_grad.__get__  # pyright: ignore[reportAttributeAccessIssue]
_TORCH = f"{os.path.dirname(torch.__file__)}{os.sep}"  # beside it lie `torchvision` and the like, and torchleaf itself


def is_asking(func: Any, caller: FrameType, also: str = "") -> bool:
    """Whether a function that code outside of torch, or in a file, calls asks if a tensor requires gradients.

    Function modes pass on what they are given. torchleaf asks for a user, where it registers the hooks of parameters.
    """
    if func != _GETTER:
        return False
    while caller.f_code.co_name == "__torch_function__" and caller.f_back is not None:
        caller = caller.f_back
    file = caller.f_code.co_filename
    return file == also or not file.startswith(_TORCH)


class Asked(FunctionMode):
    """Notes whether code outside of torch asks a tensor whether it requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked |= is_asking(func, sys._getframe(1))
        return func(*args, **(kwargs or {}))


def wants_gradients(exc: BaseException) -> bool:
    """Whether torch failed because a tensor requires no gradient."""
    return isinstance(exc, RuntimeError) and says_no_gradient_required(str(exc))
