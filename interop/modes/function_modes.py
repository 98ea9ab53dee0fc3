"""The function mode that torchleaf's own are: it sees calls of torch's functions, and nothing else changes by it.

In inference torch's attention and transformer layers take a fast path, unless `torch.overrides.has_torch_function` says
that something intercepts their calls, which it says within every function mode. Of these modes it does not.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _get_overloaded_args

from ..process.switches import Switch


class FunctionMode(TorchFunctionMode):
    """Within it, `__torch_function__` stands for each function."""

    def __enter__(self) -> "FunctionMode":
        _INTERCEPTION.acquire()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        _INTERCEPTION.release()


@contextlib.contextmanager
def _of_others() -> Iterator[None]:
    original = torch.overrides.has_torch_function

    def has_torch_function(tensors: Iterable[Any]) -> bool:
        tensors = tuple(tensors)
        if all(isinstance(mode, FunctionMode) for mode in _get_current_function_mode_stack()):
            return any(type(x) not in _PLAIN for x in _get_overloaded_args(tensors))
        return original(tensors)

    torch.overrides.has_torch_function = has_torch_function
    try:
        yield
    finally:
        torch.overrides.has_torch_function = original


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_INTERCEPTION = Switch(_of_others)
