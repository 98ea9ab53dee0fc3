"""Live residuals under vmap: one graph of the whole batch gives the gradients of each example."""

from collections.abc import Callable, Iterator

import torch

from ..replay.repeated import SMALL
from . import residuals
from .batching import vmap
from .call import Tensors, TorchCall, take
from .derivative import Vjp
from .graph import Graph
from .handles import HANDLE
from .save import Save


class PerExampleVjp(TorchCall):
    """A live `Vjp` over a batch axis: the gradients of each example, from the one graph of the whole batch.

    Operands: those of `vjp`, the handle not batched.
    """

    def __init__(self, vjp: Vjp, in_dims: tuple[int | None, ...], size: int):
        super().__init__()
        self._vjp, self._in_dims, self._size, self.handle_operand = vjp, in_dims, size, vjp.handle_operand
        inner, self._kept = vjp.recomputing()
        self._plain = vmap(inner, take(in_dims, self._kept), size)
        self._batch = (in_dims[: vjp.n_inner], size)
        self._out_dims = tuple(d or 0 for d in take(in_dims, vjp.active))
        self.base, self.differentiated, self.operations = vjp.base, True, self._plain.operations
        self.name = f"vmap({vjp.name})"
        self.out_avals = self._plain.out_avals
        avals = dict(zip(self._kept, self._plain.in_avals, strict=True))
        self.in_avals = tuple(avals.get(i, HANDLE) for i in range(len(vjp.in_avals)))

    @property
    def plain_kernels(self) -> frozenset[str]:
        return self._plain.plain_kernels

    def prepare(self) -> None:
        self._plain.prepare()

    @property
    def recordable(self) -> bool:
        return False  # it has a graph

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        n_inner = self._vjp.n_inner
        graph = residuals.take_graph(tensors[n_inner])
        if not isinstance(graph, Graph) or not graph.gives(self._vjp.active, self._batch):
            return self._plain.execute(*take(tensors, self._kept))
        grads = self._vjp.pullback(graph, (*tensors[: n_inner + 1], *self._batched(tensors)))
        return tuple(g.movedim(d, 0) for g, d in zip(grads, self._out_dims, strict=True))

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        n_inner = self._vjp.n_inner
        tape = residuals.take_tape(operands[n_inner], self._vjp.active, self._vjp.outs, self._batch)
        if tape is None:
            return False
        batched = self._batched(operands)
        tape.replay(
            operands[:n_inner], batched, (r.movedim(0, d) for r, d in zip(results, self._out_dims, strict=True))
        )
        return True

    def _batched(self, tensors: Tensors) -> Iterator[torch.Tensor]:
        """Cotangents of each example, along axis 0."""
        n_primals = self._vjp.n_primals
        for ct, d in zip(tensors[n_primals:], self._in_dims[n_primals:], strict=True):
            yield ct.expand(self._size, *ct.shape) if d is None else ct.movedim(d, 0)

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        smaller, operands = self._vjp.select(used)
        return smaller.derive(PerExampleVjp, self._in_dims, self._size), operands

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]]:
        return self._plain, self._kept

    def part(self, of: Callable[[TorchCall], TorchCall], shards: int) -> TorchCall:
        """The same on one of `shards` parts of its batch, `of` giving the part of the call that it is built on."""
        return of(self._vjp).derive(PerExampleVjp, self._in_dims, self._size // shards)


def over_batch(call: TorchCall, in_dims: tuple[int | None, ...], size: int) -> TorchCall | None:
    """A call that makes or uses a live graph over a batch axis, if one graph can hold the batch.

    Where a small call can be replayed it is none: to run the forward again, with the weights of all examples at once,
    costs less than to have them once for each example.
    """
    if isinstance(call, Save) and call.batch is None and call.base.vmap_method != "batched":
        live = call.inner.derive(Save, call.active, (in_dims, size))
        return None if live.operations <= SMALL and live.is_repeatable else live
    if isinstance(call, Vjp) and call.live and in_dims[call.n_inner] is None:
        forward = over_batch(call.inner.derive(Save, call.active), in_dims[: call.n_inner], size)
        return None if forward is None else call.derive(PerExampleVjp, in_dims, size)
    return None
