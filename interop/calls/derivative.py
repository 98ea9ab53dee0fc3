"""`Jvp` and `Vjp`: the derivatives of a torch call as torch calls, linear and each other's transpose.

Cotangents follow JAX's convention: for complex values they are the conjugate of torch's gradients.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import TorchCallError
from ..modes.dispatch import Mode
from ..modes.forward_ad import one_at_a_time
from ..process.once import Once
from ..types import Tensors
from . import residuals, reverse
from .call import Level, Linearized, TorchCall, take
from .differences import central_difference
from .graph import Graph
from .handles import HANDLE
from .hidden_writes import hidden_writes
from .plan import Plan


def linearize(call: TorchCall, active: tuple[int, ...]) -> Linearized:
    """The tangent map of `call` with respect to `active`: see `TorchCall.linearize`."""
    plain = call.graphless()
    if plain is not None and call.linearize(active) is None:
        inner, operands = plain
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

    def __init__(self, inner: TorchCall, active: tuple[int, ...], outs: tuple[int, ...], live: bool):
        super().__init__()
        self.inner, self.active, self.outs, self.live = inner, active, outs, live
        self.base, self.depth, self.differentiated = inner.base, inner.depth + 1, True
        self.operations = 3 * inner.operations
        self.n_inner = len(inner.in_avals)
        self.n_primals = self.n_inner + live
        self.handle_operand = self.n_inner if live else None
        linear_avals, self.out_avals = self._direction(take(inner.in_avals, active), take(inner.out_avals, outs))
        linear_axes, self.out_axes = self._direction(take(inner.in_axes, active), take(inner.out_axes, outs))
        self.in_avals = (*inner.in_avals, *([HANDLE] * live), *linear_avals)
        self.in_axes = (*inner.in_axes, *([{}] * live), *linear_axes)
        self.linear_operands = frozenset(range(self.n_primals, len(self.in_avals)))
        self.directions = inner.directions | self.linear_operands
        if live:
            self.choice = self.recomputing()[0].choice

    @staticmethod
    def _direction(active: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Of what the active operands and the outputs of `inner` have: what linear operands and outputs have."""
        raise AssertionError("abstract")

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        """The same map from fewer linear operands to fewer outputs (numbered within each)."""
        raise AssertionError("abstract")

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        primals, linear = self._split(tensors)

        def function(*active: torch.Tensor) -> Tensors:
            operands = list(primals)
            for i, x in zip(self.active, active, strict=True):
                operands[i] = x
            return take(self.inner.compute(plan, *operands), self.outs)

        return self._differentiate(plan, function, take(primals, self.active), linear)

    def _differentiate(self, plan: Plan, function: Callable[..., Tensors], xs: Tensors, linear: Tensors) -> Tensors:
        """The derivative of `function` at `xs`, applied to `linear`."""
        raise AssertionError("abstract")

    def fewer_examples(self) -> TorchCall:
        return self.inner.fewer_examples().derive(type(self), self.active, self.outs, False)

    def sampled(self, tensors: Tensors) -> tuple[TorchCall, Tensors]:
        if not self.live:
            return super().sampled(tensors)
        plain, operands = self.recomputing()
        return plain.sampled(take(tensors, operands))

    def explore(self) -> None:
        self._writes  # noqa: B018 (a trial run)

    @property
    def recordable(self) -> bool:
        return self.inner.recordable and not self._writes

    @property
    def _writes(self) -> bool:
        """Whether a backward pass may write into operands."""
        return self.base.derive(hidden_writes)

    def linearize(self, active: tuple[int, ...]) -> Linearized | None:
        if not self.linear_operands.issuperset(active):
            return None
        every = tuple(range(len(self.out_avals)))
        restricted = self._restrict(tuple(i - self.n_primals for i in active), every)
        return restricted, tuple(range(self.n_primals)), every

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        every = tuple(range(len(self.in_avals)))
        return self._restrict(tuple(range(len(every) - self.n_primals)), used), every

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]] | None:
        return self.recomputing() if self.live else None

    def recomputing(self) -> tuple[TorchCall, tuple[int, ...]]:
        """For a live one: the call that does without the graph, and the operands it needs."""
        operands = tuple(i for i in range(len(self.in_avals)) if i != self.n_inner)
        return self.inner.derive(type(self), self.active, self.outs, False), operands

    def _split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        if self._writes:
            tensors = tuple(x.clone() for x in tensors)
        return tensors[: self.n_inner], tensors[self.n_primals :]

    def _handle(self, tensors: Tensors) -> torch.Tensor | None:
        return tensors[self.n_inner] if self.live else None


class Jvp(_Derivative):
    """`(x, t) -> J(x) t`: tangents of the outputs `outs` from tangents of the operands `active`."""

    transform = "jvp"

    def __init__(self, inner: TorchCall, active: tuple[int, ...], outs: tuple[int, ...], live: bool):
        _load_forward_mode()
        super().__init__(inner, active, outs, live)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"jvp({self.inner.name})"

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
                return _forward_mode(function, xs, linear)
        self.base.derive(hidden_writes)  # raises where torch's backward pass is not to be used
        if self.depth <= plan.core:
            return _reverse_twice(function, xs, linear)
        return reverse.pushforward(function, xs, linear, rows=plan.rows, audited=plan.audited)

    @property
    def _writes(self) -> bool:
        try:
            return super()._writes
        except TorchCallError:
            if self.base.facts.checkpoints == "reentrant":  # forward mode does not get through them
                raise
            return True

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        residuals.discard(self._handle(tensors))  # forward mode has no use for a graph
        return super().execute(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        residuals.discard(self._handle(tensors))  # before the recording, which is void where memory is looked at
        self.settled(tensors)
        return self.run_repeatedly(super().execute, tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        residuals.discard(self._handle(operands))
        return super().replay(operands, results)


_NO_CHANGE = contextlib.nullcontext()


@Once
def _load_forward_mode() -> None:
    """torch compiles some formulas when it first needs any, with a deprecation warning of TorchScript's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


# torch.func.vjp gives a pullback that can be differentiated where gradients are enabled when it is called, as they are
# not in a running program: many backward formulas have a branch of their own for that, some of which are wrong under
# other transforms.


def _forward_mode(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    with one_at_a_time(), torch.enable_grad():
        return torch.func.jvp(function, xs, tangents)[1]


def _reverse_twice(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    with torch.enable_grad():
        outs, pullback, *_ = torch.func.vjp(function, *xs)
        # ct -> J^H ct is linear, so its own pullback, at any ct, is t -> J t. Some formulas take logarithms of ct.
        _, pushforward, *_ = torch.func.vjp(pullback, tuple(torch.full_like(y, 2**-7) for y in outs))
        return pushforward(tangents)[0]


def _reverse_mode(function: Callable[..., Tensors], xs: Tensors, cotangents: Tensors) -> Tensors:
    with torch.enable_grad():
        _, pullback, *_ = torch.func.vjp(function, *xs)
        return pullback(cotangents)


class Vjp(_Derivative):
    """`(x, ct) -> J(x)^T ct`: cotangents of the operands `active` from cotangents of the outputs `outs`."""

    transform = "vjp"

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"vjp({self.inner.name})"

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
            return reverse.conj(_reverse_mode(function, xs, linear))
        # Outside of torch.func's transforms torch.autograd is cheaper than torch.func and supports more.
        return reverse.conj(reverse.pullback(function, xs, linear, audited=plan.audited))

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        return self._by_graph(tensors) or super().execute(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        return self._by_graph(tensors) or super().repeat(*tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        handle = self._handle(operands)
        if handle is None or not residuals.is_kept(handle):
            return super().replay(operands, results)
        tape = residuals.take_tape(handle, self.active, self.outs, batch=None)
        if tape is None:
            return False
        tape.replay(*self._split(operands), results)
        return True

    def _by_graph(self, tensors: Tensors) -> Tensors | None:
        graph = residuals.take_graph(self._handle(tensors))
        if not isinstance(graph, Graph) or not graph.gives(self.active, batch=None):
            return None
        return self.pullback(graph, tensors)

    def pullback(self, graph: Graph, tensors: Tensors) -> Tensors:
        """The cotangents by a live graph."""
        primals, cotangents = self._split(tensors)
        return reverse.conj(graph.pullback(primals, self.active, self.outs, reverse.conj(cotangents)))
