"""`Jvp` and `Vjp`: the derivatives of a torch call as torch calls, linear and each other's transpose.

Cotangents follow JAX's convention: for complex values they are the conjugate of torch's gradients.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from ..errors import TorchCallError
from ..modes.dispatch import Mode
from ..types import Tensors
from . import reverse
from .call import Computation, Level, Linearized, TorchCall, graphless, take
from .differences import central_difference
from .execution import Execution
from .handles import HANDLE
from .hidden_writes import hidden_writes
from .live import JvpExecution, VjpExecution
from .plan import Plan
from .products import forward_mode, load_forward_mode, reverse_mode, reverse_twice

_NO_CHANGE = contextlib.nullcontext()


def linearize(call: TorchCall, active: tuple[int, ...]) -> Linearized:
    """The tangent map of `call` with respect to `active`: see `TorchCall.linearize`."""
    recomputing = call.graphless()
    if recomputing is not None and call.linearize(active) is None:
        inner, operands = recomputing
        position = {operand: i for i, operand in enumerate(operands)}
        tangent_call, kept, outs = linearize(inner, tuple(position[i] for i in active))
        return tangent_call, take(operands, kept), outs
    residual_operands = tuple(range(len(call.in_avals)))
    return call.linearize(active) or (
        call.derive(Jvp, active, call.inexact_outs, False),
        residual_operands,
        call.inexact_outs,
    )


class _Derivative(Level):
    """What `Jvp` and `Vjp` share.

    Operands: those of `inner`, then (if `live`) the handle of its graph, then the linear ones.
    """

    def __init__(self, inner: Computation, active: tuple[int, ...], outs: tuple[int, ...], live: bool):
        super().__init__()
        self.inner, self.active, self.outs, self.live = inner, active, outs, live
        self.name = f"{self.transform}({inner.name})"
        self.base, self.depth, self.differentiated = inner.base, inner.depth + 1, True
        self.flops = 3 * inner.flops
        self.n_inner = len(inner.in_avals)
        self.n_primals = self.n_inner + live
        self.handle_operand = self.n_inner if live else None
        linear_avals, self.out_avals = self._direction(take(inner.in_avals, active), take(inner.out_avals, outs))
        linear_axes, self.out_axes = self._direction(take(inner.in_axes, active), take(inner.out_axes, outs))
        self.in_avals = (*inner.in_avals, *([HANDLE] * live), *linear_avals)
        self.in_axes = (*inner.in_axes, *([{}] * live), *linear_axes)
        self.linear_operands = frozenset(range(self.n_primals, len(self.in_avals)))
        self.directions = inner.directions | self.linear_operands

    @staticmethod
    @abstractmethod
    def _direction(active: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Of what the active operands and the outputs of `inner` have: what linear operands and outputs have."""

    @abstractmethod
    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        """The same map from fewer linear operands to fewer outputs (numbered within each)."""

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        primals, linear = self.split(tensors)

        def function(*active: torch.Tensor) -> Tensors:
            operands = list(primals)
            for i, x in zip(self.active, active, strict=True):
                operands[i] = x
            return take(self.inner.compute(plan, *operands), self.outs)

        return self._differentiate(plan, function, take(primals, self.active), linear)

    @abstractmethod
    def _differentiate(self, plan: Plan, function: Callable[..., Tensors], xs: Tensors, linear: Tensors) -> Tensors:
        """The derivative of `function` at `xs`, applied to `linear`."""

    def fewer_examples(self) -> Computation:
        return self.inner.fewer_examples().derive(type(self), self.active, self.outs, False)

    def sampled(self, tensors: Tensors) -> tuple[Computation, Tensors]:
        if not self.live:
            return super().sampled(tensors)
        recomputing, operands = graphless(self)
        return recomputing.sampled(take(tensors, operands))

    def explore(self) -> None:
        self.writes()

    @property
    def recordable(self) -> bool:
        return self.inner.recordable and not self.writes()

    def writes(self) -> bool:
        """Whether a backward pass may write into operands, by a fake run."""
        return self.base.derive(hidden_writes)

    def linearize(self, active: tuple[int, ...]) -> Linearized | None:
        if not self.linear_operands.issuperset(active):
            return None
        every = tuple(range(len(self.out_avals)))
        restricted = self._restrict(tuple(i - self.n_primals for i in active), every)
        return restricted, tuple(range(self.n_primals)), every

    def dce(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        every = tuple(range(len(self.in_avals)))
        return self._restrict(tuple(range(len(every) - self.n_primals)), used), every

    def graphless(self) -> tuple[Computation, tuple[int, ...]] | None:
        if not self.live:
            return None
        operands = tuple(i for i in range(len(self.in_avals)) if i != self.n_inner)
        return self.inner.derive(type(self), self.active, self.outs, False), operands

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        if self.writes():
            tensors = tuple(x.clone() for x in tensors)
        return tensors[: self.n_inner], tensors[self.n_primals :]

    def handle(self, tensors: Tensors) -> torch.Tensor | None:
        """The handle among operands, if it takes one."""
        return tensors[self.n_inner] if self.live else None


class Jvp(_Derivative):
    """`(x, t) -> J(x) t`: tangents of the outputs `outs` from tangents of the operands `active`."""

    transform = "jvp"

    def __init__(self, inner: Computation, active: tuple[int, ...], outs: tuple[int, ...], live: bool):
        load_forward_mode()
        super().__init__(inner, active, outs, live)

    @staticmethod
    def _direction(active: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return active, outs

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Jvp, take(self.active, operands), take(self.outs, outs), self.live)

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        active = take(self.active, [i - self.n_primals for i in linear])
        return self.inner.derive(Vjp, active, take(self.outs, outs), self.live), tuple(range(self.n_primals))

    def _differentiate(self, plan: Plan, function: Callable[..., Tensors], xs: Tensors, linear: Tensors) -> Tensors:
        if self.depth == plan.differences:
            return central_difference(function, xs, linear)
        if self.depth <= plan.core and plan.forward:
            with Mode() if plan.real_zeros else _NO_CHANGE:
                return forward_mode(function, xs, linear)
        self.base.derive(hidden_writes)  # raises where torch's backward pass is not to be used
        if self.depth <= plan.core:
            return reverse_twice(function, xs, linear)
        return reverse.pushforward(function, xs, linear, rows=plan.rows, audited=plan.audited)

    def writes(self) -> bool:
        try:
            return super().writes()
        except TorchCallError:
            if self.base.facts.checkpoints == "reentrant":  # forward mode does not get through them
                raise
            return True

    def _execution(self) -> Execution:
        return JvpExecution(self)


class Vjp(_Derivative):
    """`(x, ct) -> J(x)^T ct`: cotangents of the operands `active` from cotangents of the outputs `outs`."""

    transform = "vjp"

    @staticmethod
    def _direction(active: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return outs, active

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Vjp, take(self.active, outs), take(self.outs, operands), self.live)

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        chosen = take(self.outs, [i - self.n_primals for i in linear])
        return self.inner.derive(Jvp, take(self.active, outs), chosen, self.live), tuple(range(self.n_primals))

    def _differentiate(self, plan: Plan, function: Callable[..., Tensors], xs: Tensors, linear: Tensors) -> Tensors:
        linear = reverse.conj(linear)
        if self.depth <= plan.core:
            return reverse.conj(reverse_mode(function, xs, linear))
        # Outside of torch.func's transforms torch.autograd is cheaper than torch.func and supports more.
        return reverse.conj(reverse.pullback(function, xs, linear, audited=plan.audited))

    def _execution(self) -> Execution:
        return VjpExecution(self)
