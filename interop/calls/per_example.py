"""Live residuals under vmap: one graph of the whole batch gives the gradients of each example."""

from collections.abc import Callable, Iterator

import torch

from ..replay.repeated import SMALL
from ..types import Tensors
from . import residuals
from .batching import vmap
from .call import Computation, TorchCall, graphless, take
from .derivative import Vjp
from .execution import Execution, planned
from .graph import Graph
from .handles import HANDLE
from .live import pullback
from .save import Save


class PerExampleVjp(TorchCall):
    """A live `Vjp` over a batch axis: the gradients of each example, from the one graph of the whole batch.

    Operands: those of `vjp`, the handle not batched.
    """

    def __init__(self, vjp: Vjp, in_dims: tuple[int | None, ...], size: int):
        super().__init__()
        self.vjp, self._in_dims, self._size, self.handle_operand = vjp, in_dims, size, vjp.handle_operand
        inner, self.kept = graphless(vjp)
        self._graphless = vmap(inner, take(in_dims, self.kept), size)
        self.batch = (in_dims[: vjp.n_inner], size)
        self.out_dims = tuple(d or 0 for d in take(in_dims, vjp.active))
        self.base, self.differentiated, self.flops = vjp.base, True, self._graphless.flops
        self.name = f"vmap({vjp.name})"
        self.out_avals = self._graphless.out_avals
        avals = dict(zip(self.kept, self._graphless.in_avals, strict=True))
        self.in_avals = tuple(avals.get(i, HANDLE) for i in range(len(vjp.in_avals)))

    def _execution(self) -> Execution:
        return PerExampleExecution(self)

    def batched(self, tensors: Tensors) -> Iterator[torch.Tensor]:
        """Cotangents of each example, along axis 0."""
        n_primals = self.vjp.n_primals
        for ct, d in zip(tensors[n_primals:], self._in_dims[n_primals:], strict=True):
            yield ct.expand(self._size, *ct.shape) if d is None else ct.movedim(d, 0)

    def dce(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        smaller, operands = self.vjp.dce(used)
        return smaller.derive(PerExampleVjp, self._in_dims, self._size), operands

    def graphless(self) -> tuple[Computation, tuple[int, ...]]:
        return self._graphless, self.kept

    def part(self, of: Callable[[TorchCall], TorchCall], shards: int) -> TorchCall:
        """The same on one of `shards` parts of its batch, `of` giving the part of the call that it is built on."""
        return of(self.vjp).derive(PerExampleVjp, self._in_dims, self._size // shards)


class PerExampleExecution(Execution):
    """The graph of the batch, if it is there, gives the gradients; else the forward runs again."""

    def __init__(self, call: PerExampleVjp):
        super().__init__(call)
        self._of, self._graphless = call, planned(graphless(call)[0])

    @property
    def plain_kernels(self) -> frozenset[str]:
        return self._graphless.plain_kernels

    def prepare(self) -> None:
        self._graphless.prepare()

    @property
    def recordable(self) -> bool:
        return False  # it has a graph

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        call, vjp = self._of, self._of.vjp
        graph = residuals.take_graph(tensors[vjp.n_inner])
        if not isinstance(graph, Graph) or not graph.gives(vjp.active, call.batch):
            return self._graphless.execute(*take(tensors, call.kept))
        grads = pullback(vjp, graph, (*tensors[: vjp.n_inner + 1], *call.batched(tensors)))
        return tuple(g.movedim(d, 0) for g, d in zip(grads, call.out_dims, strict=True))

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        return self.execute(*tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        call, vjp = self._of, self._of.vjp
        tape = residuals.take_tape(operands[vjp.n_inner], vjp.active, vjp.outs, call.batch)
        if tape is None:
            return False
        moved = (r.movedim(0, d) for r, d in zip(results, call.out_dims, strict=True))
        tape.replay(operands[: vjp.n_inner], call.batched(operands), moved)
        return True


def over_batch(call: TorchCall, in_dims: tuple[int | None, ...], size: int) -> TorchCall | None:
    """A call that makes or uses a live graph over a batch axis, if one graph can hold the batch.

    Where a small call can be replayed it is none: to run the forward again, with the weights of all examples at once,
    costs less than to have them once for each example.
    """
    if isinstance(call, Save) and call.batch is None and call.base.options.vmap_method != "batched":
        live = call.inner.derive(Save, call.active, (in_dims, size))
        return None if live.flops <= SMALL and live.execution.is_repeatable else live
    if isinstance(call, Vjp) and call.live and in_dims[call.n_inner] is None:
        forward = over_batch(call.inner.derive(Save, call.active), in_dims[: call.n_inner], size)
        return None if forward is None else call.derive(PerExampleVjp, in_dims, size)
    return None
