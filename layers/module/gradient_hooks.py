"""Hooks of parameters (`weight.register_hook`): they change the gradients of a call as they change torch's.

The skeleton of a module holds them; a call registers them on the tensors that it puts in the parameters' places. So a
hook sees the gradient of one call, all uses of the parameter in it summed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .copying import Copier

Hooks = dict[str, list[Callable[[torch.Tensor], Any]]]

_NAME = "_torchleaf_gradient_hooks"


def copy_hooks(weights: Sequence[tuple[str, torch.Tensor]], skeleton: torch.nn.Module, copier: "Copier") -> None:
    """Give the skeleton copies of the hooks of the weights."""
    found = {name: list(tensor._backward_hooks.values()) for name, tensor in weights if tensor._backward_hooks}
    if found:
        vars(skeleton)[_NAME] = copier.copy(found)


def hooks_of(skeleton: torch.nn.Module) -> Hooks:
    """The hooks, by weight."""
    return vars(skeleton).get(_NAME, {})


def register_hooks(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Turn the hooks that a copy of the skeleton holds into those of its parameters."""
    for name, hooks in vars(module).pop(_NAME, {}).items():
        for hook in hooks:
            if weights[name].requires_grad:
                weights[name].register_hook(hook)


def hooked(tensor: torch.Tensor, hooks: Sequence[Callable[[torch.Tensor], Any]]) -> torch.Tensor:
    """The tensor, with hooks where gradients flow through it."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    view = tensor.view_as(tensor)
    for hook in hooks:
        view.register_hook(hook)
    return view
