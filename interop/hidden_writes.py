"""What a trace of the forward call cannot see of differentiation, found by a fake backward pass.

Hooks (`x.register_hook(lambda g: g.clamp_(-1, 1))`) and custom functions write into cotangents and into what they
saved; some code writes where `x.requires_grad`. The memory is JAX's, whose arrays never change.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import reverse
from .aten import bound, written
from .call import Tensors, TorchCall, take
from .dtypes import is_inexact
from .errors import RandomnessError, TorchCallError
from .modes import Mode
from .random import draws
from .trial import trial_run


def hidden_writes(call: TorchCall) -> bool:
    """Whether torch's backward pass of a call may write into its operands or into cotangents.

    Raises `TorchCallError` for a forward pass that writes into operands only where gradients are recorded,
    `RandomnessError` for a backward pass that draws random numbers.
    """
    buffers = call.base.buffers
    active = tuple(i for i, aval in enumerate(call.in_avals) if is_inexact(aval.dtype) and i not in buffers)
    cotangents = take(call.out_avals, call.inexact_outs)
    n, found = len(call.in_avals), list[_Watch]()

    def differentiate(*tensors: torch.Tensor) -> None:
        operands = list(tensors[:n])

        def function(*xs: torch.Tensor) -> Tensors:
            for i, x in zip(active, xs, strict=True):
                operands[i] = x
            outs = call.base.run(*operands)
            watch.in_forward, watch.writes, watch.random = watch.writes, False, None  # what follows is backward
            return take(outs, call.inexact_outs)

        watch = _Watch(tensors)
        found.append(watch)
        with watch:
            reverse.pullback(function, take(tensors, active), tensors[n:])

    if not call.base.fakeable and call.base.reads is None:
        return True
    failure = trial_run(differentiate, (*call.in_avals, *cotangents), call.base.device, call.base.reads or ())
    if any(w.in_forward for w in found) or _LEAF_WRITTEN in str(failure):
        raise TorchCallError(
            f"{call.name} writes into an argument only where that requires gradients, so that it and its gradient "
            "would be of two functions. Write in all cases, or into a clone."
        )
    random = next((w.random for w in found if failure is None and w.random is not None), None)
    if random is not None:
        raise RandomnessError(
            f"{call.name} draws random numbers in its backward pass ({random}), which no key drives. Draw them in the "
            "forward pass and save them."
        )
    return failure is not None or any(w.writes for w in found)


_LEAF_WRITTEN = "leaf Variable that requires grad is being used in an in-place"


class _Watch(Mode):
    """Notes writes into `tensors` or views of them, and random ops."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.writes = self.in_forward = False
        self.random: Any = None
        self._storages = {x.untyped_storage()._cdata for x in tensors}

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        arguments = bound(func, args, kwargs)
        self.writes |= any(x.untyped_storage()._cdata in self._storages for x in written(func, arguments))
        if draws(func, arguments):
            self.random = func
        return func(*args, **kwargs)
