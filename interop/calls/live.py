"""How derivatives are carried out where a forward call has kept its graph, or a recording of both has."""

from typing import TYPE_CHECKING

import torch

from ..types import Tensors
from . import residuals, reverse
from .call import graphless
from .choice import Choice
from .execution import Planned, planned
from .graph import Graph

if TYPE_CHECKING:
    from .derivative import Jvp, Vjp


def _choice_of(call: "Jvp | Vjp") -> Choice | None:
    """With a graph or without, a derivative has one plan."""
    return planned(graphless(call)[0]).choice if call.live else None


class JvpExecution(Planned):
    """Forward mode has no use for a graph."""

    def __init__(self, call: "Jvp"):
        super().__init__(call, _choice_of(call))
        self._jvp = call

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        residuals.discard(self._jvp.handle(tensors))
        return super().execute(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        residuals.discard(self._jvp.handle(tensors))  # before the recording, which is void where memory is looked at
        self.settled(tensors)
        return self.run_repeatedly(super().execute, tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        residuals.discard(self._jvp.handle(operands))
        return super().replay(operands, results)


class VjpExecution(Planned):
    """The graph of the forward call, if it is there, gives the cotangents; else the forward runs again."""

    def __init__(self, call: "Vjp"):
        super().__init__(call, _choice_of(call))
        self._vjp = call

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        return self._by_graph(tensors) or super().execute(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        return self._by_graph(tensors) or super().repeat(*tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        vjp = self._vjp
        handle = vjp.handle(operands)
        if handle is None or not residuals.is_kept(handle):
            return super().replay(operands, results)
        tape = residuals.take_tape(handle, vjp.active, vjp.outs, batch=None)
        if tape is None:
            return False
        tape.replay(*vjp.split(operands), results)
        return True

    def _by_graph(self, tensors: Tensors) -> Tensors | None:
        graph = residuals.take_graph(self._vjp.handle(tensors))
        if not isinstance(graph, Graph) or not graph.gives(self._vjp.active, batch=None):
            return None
        return pullback(self._vjp, graph, tensors)


def pullback(vjp: "Vjp", graph: Graph, tensors: Tensors) -> Tensors:
    """The cotangents by a live graph."""
    primals, cotangents = vjp.split(tensors)
    return reverse.conj(graph.pullback(primals, vjp.active, vjp.outs, reverse.conj(cotangents)))
