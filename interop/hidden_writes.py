"""Writes into operands that a trace of the forward call cannot see, found by a fake backward pass.

Hooks (`x.register_hook(lambda g: g.clamp_(-1, 1))`) and custom functions write into cotangents and into what they
saved; some code writes where `x.requires_grad`. The memory is JAX's, whose arrays never change.
"""

import torch

from . import reverse
from .aten import WatchWrites
from .call import Tensors, TorchCall, take
from .dtypes import is_inexact
from .errors import TorchCallError
from .trial import trial_run


def hidden_writes(call: TorchCall) -> bool:
    """Whether torch's backward pass of a call may write into its operands or into cotangents.

    Raises `TorchCallError` for a forward pass that writes into operands only where gradients are recorded.
    """
    active = tuple(i for i, aval in enumerate(call.in_avals) if is_inexact(aval.dtype))
    cotangents = take(call.out_avals, call.inexact_outs)
    n, in_forward, in_backward = len(call.in_avals), list[bool](), list[bool]()

    def differentiate(*tensors: torch.Tensor) -> None:
        operands = list(tensors[:n])

        def function(*xs: torch.Tensor) -> Tensors:
            for i, x in zip(active, xs, strict=True):
                operands[i] = x
            with WatchWrites(tensors) as watch:
                outs = call.run(*operands)
            in_forward.append(watch.seen)
            return take(outs, call.inexact_outs)

        with WatchWrites(tensors) as watch:
            reverse.pullback(function, take(tensors, active), tensors[n:])
        in_backward.append(watch.seen)

    failure = trial_run(differentiate, (*call.in_avals, *cotangents)) if call.composable else None
    if any(in_forward) or "leaf Variable that requires grad is being used in an in-place" in str(failure):
        raise TorchCallError(
            f"{call.name} writes into an argument only where that requires gradients, so that it and its gradient "
            "would be of two functions. Write in all cases, or into a clone."
        )
    return not call.composable or failure is not None or any(in_backward)
