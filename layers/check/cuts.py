"""What a forward does so that its gradients are not its derivatives, on purpose: it detaches, or rounds."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...interop.internals.ops import SET_GRAD_ENABLED
from .subject import Subject

_CUTS = {
    torch.Tensor.detach: "detach",
    torch.Tensor.detach_: "detach",
    torch.detach: "detach",
    SET_GRAD_ENABLED: "no_grad",
    torch.Tensor.data.__get__: ".data",  # pyright: ignore[reportAttributeAccessIssue]
}
_ROUNDING = ("round", "floor", "ceil", "trunc", "sign", "heaviside", "argmax", "argmin", "bucketize", "searchsorted")
_CUTS |= {getattr(where, name): name for where in (torch, torch.Tensor) for name in _ROUNDING if hasattr(where, name)}


class _Watch(TorchFunctionMode):
    """Notes the functions that cut gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CUTS:
            self.found[_CUTS[func]] = None
        return func(*args, **(kwargs or {}))


def cuts_of(subject: Subject) -> list[str]:
    """The functions by which a forward cuts gradients, as users call them."""
    module, args = subject.reference(), subject.arguments(0)
    with _Watch() as watch:
        module(*args)
    return list(watch.found)
