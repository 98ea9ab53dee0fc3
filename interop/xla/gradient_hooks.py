"""Hooks on gradients, which change the derivative of a callable and leave no op: whoever differentiates is told."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from ..errors import TorchCallError
from ..internals.ops import BackwardHookFunction
from ..modes.function_applies import applications_heard_by
from ..modes.function_modes import FunctionMode
from ..modes.own_gradients import is_asking
from ..values.dtypes import is_inexact_tensor


class HookSearch(FunctionMode):
    """Notes hooks, and what may register some where tensors require gradients: code that asks whether they do."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked |= is_asking(func, sys._getframe(1), also=torch.utils.hooks.__file__)
        self.found |= func is torch.Tensor.register_hook
        return func(*args, **(kwargs or {}))

    def run_with_gradients(self, run: Callable[..., Any], operands: Sequence[torch.Tensor]) -> None:
        """Search again where all operands require gradients; code that fails then cannot be differentiated."""
        with torch.enable_grad():
            given = [x.requires_grad_(is_inexact_tensor(x)).clone() for x in operands]  # which may be written into
        with self, applications_heard_by(self._hear), torch.enable_grad():
            try:
                run(*given)
            except Exception:
                return

    def _hear(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        self.found |= cls is BackwardHookFunction
        return run(*args, **kwargs)


def without_derivative(message: str) -> Callable[[Any], Any]:
    """The identity, which is refused where it is differentiated, with this message."""

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise TorchCallError(message)

    return same


HOOKS = (
    "registers hooks on gradients (`register_hook`, `register_full_backward_hook`), which change its derivative, and "
    "which engine='xla' does not have. Use engine='torch' to differentiate it."
)
REENTRANT = (
    "uses torch.utils.checkpoint with use_reentrant=True, whose backward pass leaves out the gradients of weights. "
    "Pass `use_reentrant=False`."
)
