"""`Jvp` and `Vjp`: the derivatives of a torch call as torch calls, linear and each other's transpose.

Cotangents follow JAX's convention: for complex values they are the conjugate of torch's gradients.
"""

import warnings
from collections.abc import Callable
from functools import cached_property

import torch

from . import residuals, reverse
from .call import Aval, Linearized, Tensors, TorchCall, take
from .graph import Graph
from .handles import HANDLE
from .hidden_writes import hidden_writes
from .once import Once
from .trial import trial_run


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


class _Derivative(TorchCall):
    """What `Jvp` and `Vjp` share.

    Operands: those of `inner`, then (if `live`) the handle of its graph, then the linear ones.
    """

    def __init__(self, inner: TorchCall, active: tuple[int, ...], outs: tuple[int, ...], live: bool):
        super().__init__()
        self.inner, self.active, self.outs, self.live = inner, active, outs, live
        self.base, self.differentiated = inner.base, True
        self.operations = 3 * inner.operations
        self.n_inner = len(inner.in_avals)
        self.n_primals = self.n_inner + live
        self.handle_operand = self.n_inner if live else None
        linear_avals, self.out_avals = self._direction(take(inner.in_avals, active), take(inner.out_avals, outs))
        self.in_avals = (*inner.in_avals, *([HANDLE] * live), *linear_avals)
        self.linear_operands = frozenset(range(self.n_primals, len(self.in_avals)))

    @property
    def plain_kernels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.plain_kernels or self.inner.differentiated or isinstance(self, Jvp)

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        """Avals of the linear operands and of the outputs."""
        raise AssertionError("abstract")

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        """The same map from fewer linear operands to fewer outputs (numbered within each)."""
        raise AssertionError("abstract")

    def prepare(self) -> None:
        self.inner.prepare()

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
        return tensors[: self.n_inner], tensors[self.n_primals :]

    def _handle(self, tensors: Tensors) -> torch.Tensor | None:
        return tensors[self.n_inner] if self.live else None

    def _function(self, primals: Tensors) -> tuple[Callable[..., Tensors], Tensors]:
        """The chosen outputs as a function of the active operands alone, and those operands."""

        def function(*active: torch.Tensor) -> Tensors:
            operands = list(primals)
            for i, x in zip(self.active, active, strict=True):
                operands[i] = x
            return take(self.inner.run(*operands), self.outs)

        return function, take(primals, self.active)


class Jvp(_Derivative):
    """`(x, t) -> J(x) t`: tangents of the outputs `outs` from tangents of the operands `active`."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"jvp({self.inner.name})"

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        return active, outs

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Jvp, take(self.active, operands), take(self.outs, outs), self.live)

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        active = take(self.active, [i - self.n_primals for i in linear])
        return self.inner.derive(Vjp, active, take(self.outs, outs), self.live), tuple(range(self.n_primals))

    def run(self, *tensors: torch.Tensor) -> Tensors:
        primals, tangents = self._split(tensors)
        function, xs = self._function(primals)
        return self._strategy(function, xs, tangents)

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        residuals.discard(self._handle(tensors))  # forward mode has no use for a graph
        return self.run(*tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        residuals.discard(self._handle(operands))
        return super().replay(operands, results)

    def prepare(self) -> None:
        super().prepare()
        self.composable  # noqa: B018 (decides the strategy)

    @property
    def composable(self) -> bool:
        return self._strategy is not reverse.pushforward

    @property
    def recordable(self) -> bool:
        return self.inner.recordable and self.composable

    @cached_property
    def _strategy(self) -> Callable[..., Tensors]:
        """Forward mode where torch has every formula; else reverse mode twice; else plain autograd."""
        _load_forward_mode()
        if self.inner.composable and trial_run(self._trial(_forward_mode), self.in_avals, self.base.device) is None:
            return _forward_mode
        pullback = self.inner.derive(Vjp, self.active, self.outs, False)
        if pullback.composable and trial_run(self._trial(_reverse_twice), self.in_avals, self.base.device) is None:
            return _reverse_twice
        return reverse.pushforward

    def _trial(self, strategy: Callable[..., Tensors]) -> Callable[..., Tensors]:
        def run(*tensors: torch.Tensor) -> Tensors:
            primals, tangents = self._split(tensors)
            return strategy(*self._function(primals), tangents)

        return run


@Once
def _load_forward_mode() -> None:
    """torch compiles some formulas when it first needs any, with a deprecation warning of TorchScript's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _forward_mode(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    return torch.func.jvp(function, xs, tangents)[1]


def _reverse_twice(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    outs, pullback, *_ = torch.func.vjp(function, *xs)
    # ct -> J^H ct is linear, so its own pullback, at any ct, is t -> J t.
    _, pushforward, *_ = torch.func.vjp(pullback, tuple(torch.zeros_like(y) for y in outs))
    return pushforward(tangents)[0]


class Vjp(_Derivative):
    """`(x, ct) -> J(x)^T ct`: cotangents of the operands `active` from cotangents of the outputs `outs`."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"vjp({self.inner.name})"

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        return outs, active

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Vjp, take(self.active, outs), take(self.outs, operands), self.live)

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        chosen = take(self.outs, [i - self.n_primals for i in linear])
        return self.inner.derive(Jvp, take(self.active, outs), chosen, self.live), tuple(range(self.n_primals))

    def run(self, *tensors: torch.Tensor) -> Tensors:
        return self._functional(*tensors) if self.composable else self._autograd(*tensors)

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        # Outermost, torch.autograd is cheaper than torch.func and supports more.
        return self._by_graph(tensors) or self._autograd(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        return self._by_graph(tensors) or self.run_repeatedly(self._autograd, tensors)

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

    def prepare(self) -> None:
        super().prepare()
        self.base.derive(hidden_writes)

    @property
    def recordable(self) -> bool:
        return self.inner.recordable and not self.base.derive(hidden_writes)

    def _split(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        if self.base.derive(hidden_writes):
            tensors = tuple(x.clone() for x in tensors)
        return super()._split(tensors)

    def pullback(self, graph: Graph, tensors: Tensors) -> Tensors:
        """The cotangents by a live graph."""
        primals, cotangents = self._split(tensors)
        return reverse.conj(graph.pullback(primals, self.active, self.outs, reverse.conj(cotangents)))

    @cached_property
    def composable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.inner.composable and trial_run(self._trial, self.in_avals, self.base.device) is None

    def _trial(self, *tensors: torch.Tensor) -> None:
        self._functional(*tensors)
        with torch.enable_grad():  # where torch.func would give zeros for a second derivative, torch.autograd raises
            self._autograd(*tensors)

    def _functional(self, *tensors: torch.Tensor) -> Tensors:
        primals, cotangents = self._split(tensors)
        function, xs = self._function(primals)
        _, pullback, *_ = torch.func.vjp(function, *xs)
        return reverse.conj(pullback(reverse.conj(cotangents)))

    def _autograd(self, *tensors: torch.Tensor) -> Tensors:
        primals, cotangents = self._split(tensors)
        function, xs = self._function(primals)
        return reverse.conj(reverse.pullback(function, xs, reverse.conj(cotangents)))
