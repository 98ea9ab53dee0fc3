"""`bind`: a JAX call on tensors, as torch's autograd, forward mode and torch.func see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..internals.ops import plain_apply, requires_grad
from ..internals.transforms import TRANSFORM, has_tangents, innermost_transform, is_wrapped, unwrapped
from ..process.nesting import depth_here, run_at
from .call import JaxCall
from .op import run_or_trace
from .residuals import Saved, saved

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Program:
    """By what a call is computed: something that gives its outputs, and perhaps more, from its operands and hints."""

    call: JaxCall
    picks: tuple[int, ...]
    """Which of operands and hints it takes."""
    saved: Saved | None = None
    """What its further outputs are to the backward half."""


def bind(call: JaxCall, *operands: torch.Tensor) -> Outputs:
    """The outputs of a call, differentiable and batched by torch to any order.

    What is innermost decides: reverse mode keeps residuals, `torch.func.vmap` is left to the batched call, which
    decides anew.
    """
    transform = innermost_transform()
    if transform is None and not (torch.is_grad_enabled() and any(map(requires_grad, operands))):
        return _apply(call, None, operands) if any(map(has_tangents, operands)) else run_or_trace(call, operands)
    if transform in (None, TRANSFORM.Grad):
        active = tuple(i for i in call.inexact if _requires_grad(operands[i]))
        if active and call.inexact_outs:
            halves = saved(call, active)
            program = Program(halves.forward, tuple(range(len(operands))), halves)
            return _apply(call, program, operands)[: len(call.out_avals)]
    return _apply(call, None, operands)


def _requires_grad(tensor: torch.Tensor) -> bool:
    """Whether a tensor requires a gradient in one of the transforms that run, or in none."""
    while not requires_grad(tensor) and is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return requires_grad(tensor)


def _apply(call: JaxCall, program: Program | None, tensors: Sequence[torch.Tensor]) -> Outputs:
    return _JaxCall.apply(call, program, *tensors)


class _JaxCall(torch.autograd.Function):
    """`call` of the first tensors, its operands, computed by `program`, to which all others are hints.

    Derivatives are those of `call`, a function of operands alone: residuals, which are outputs that have no gradient
    and hints that need none, save time and nothing else. So any order is right.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without transforms, at once what `torch.autograd.Function.apply` comes to after inspecting signatures."""
        return super().apply(*args) if innermost_transform() is not None else plain_apply(cls, *args)

    @staticmethod
    def forward(*args: Any) -> Outputs:
        call, program, *tensors = args
        if program is None:
            return run_or_trace(call, tensors)
        return run_or_trace(program.call, [tensors[i] for i in program.picks])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        call, program, *tensors = inputs
        operands = tensors[: len(call.avals)]
        ctx.call, ctx.saved = call, None if program is None else program.saved
        ctx.depth = depth_here()  # which autograd's own threads do not know
        ctx.n_tensors, ctx.n_outs = len(tensors), len(output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for i, y in enumerate(output) if i not in call.inexact_outs))
        hints = [output[i] for i in ctx.saved.outs] if ctx.saved else []
        ctx.save_for_backward(*operands, *hints)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        return run_at(max(ctx.depth, depth_here()), _gradients, ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        call = ctx.call
        active = tuple(i for i in call.inexact if tangents[2 + i] is not None)
        result: list[Any] = [None] * ctx.n_outs
        if active and call.inexact_outs:
            found = bind(call.jvp(active), *ctx.saved_tensors[: len(call.avals)], *(tangents[2 + i] for i in active))
            for i, tangent in zip(call.inexact_outs, found, strict=True):
                result[i] = tangent
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Outputs, tuple[int, ...]]:
        (call, program, *tensors), dims = args, in_dims[2:]
        batched = call.vmap(tuple(dims[: len(call.avals)]), info.batch_size)
        if program is None:
            outs = bind(batched, *tensors)
        else:
            picked = tuple(dims[i] for i in program.picks)
            outs = _with_hints(batched, Program(program.call.vmap(picked, info.batch_size), program.picks), tensors)
        return outs, (0,) * len(outs)


def _gradients(ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Those of all that a call was given, for the cotangents that there are."""
    call, halves = ctx.call, ctx.saved
    wanted = tuple(i for i in call.inexact if ctx.needs_input_grad[2 + i])
    present = tuple(i for i in call.inexact_outs if cotangents[i] is not None)
    gradients: list[Any] = [None] * (2 + ctx.n_tensors)
    if wanted and present:
        n = len(call.avals)
        tensors = ctx.saved_tensors  # once: hooks such as those of torch.utils.checkpoint allow no more
        operands, hints = tensors[:n], tensors[n:]
        ct = [cotangents[i] for i in present]
        if halves is not None and {*wanted} <= {*halves.active}:
            picks = (*halves.operands, *range(n + len(ct), n + len(ct) + len(hints)), *range(n, n + len(ct)))
            program = Program(halves.backward(wanted, present), picks)
            found = _with_hints(call.vjp(wanted, present), program, [*operands, *ct, *hints])
        else:
            found = bind(call.vjp(wanted, present), *operands, *ct)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[2 + i] = gradient
    return tuple(gradients)


def _with_hints(call: JaxCall, program: Program, tensors: Sequence[torch.Tensor]) -> Outputs:
    """A call by a program, without looking for another."""
    is_plain = innermost_transform() is None and not any(map(has_tangents, tensors))
    if is_plain and not (torch.is_grad_enabled() and any(map(requires_grad, tensors[: len(call.avals)]))):
        return run_or_trace(program.call, [tensors[i] for i in program.picks])
    return _apply(call, program, tensors)
