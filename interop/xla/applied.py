"""A `torch.autograd.Function` that torch computes within the program."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import TorchCallError
from ..internals.ops import torch_pytree


class Applied:
    """A `torch.autograd.Function` as a function."""

    def __init__(self, function: Any):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


def refuse_modules(name: str, function: Any, given: Sequence[Any], is_unknown: Callable[[torch.Tensor], bool]) -> None:
    """Raise if a function is given a module with weights that are operands of the call `name`.

    They lie in the module while the call is captured; torch computes the function, and its derivative, later.
    """
    for module in (x for x in torch_pytree.tree_leaves(given) if isinstance(x, torch.nn.Module)):
        if any(map(is_unknown, (*module.parameters(), *module.buffers()))):
            raise TorchCallError(
                f"{name} hands a module with weights to torch.autograd.Function {function.__name__}, and with "
                "engine='xla' they are not there any more when torch computes it. Pass the weights as arguments of the "
                "function, or use engine='torch'."
            )
