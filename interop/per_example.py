"""Live residuals under vmap: one graph of the whole batch gives the gradients of each example."""

import torch

from . import residuals
from .batching import vmap
from .call import Tensors, TorchCall, take
from .derivative import Vjp


class PerExampleVjp(TorchCall):
    """A live `Vjp` over a batch axis: the gradients of each example, from the one graph of the whole batch.

    Operands: those of `vjp`, the handle not batched.
    """

    def __init__(self, vjp: Vjp, in_dims: tuple[int | None, ...], size: int):
        super().__init__()
        self._vjp, self._in_dims, self._size = vjp, in_dims, size
        inner, self._kept = vjp.recomputing()
        self._plain = vmap(inner, take(in_dims, self._kept), size)
        self.base, self.differentiated, self.operations = vjp.base, True, self._plain.operations
        self.name = f"vmap({vjp.name})"
        self.out_avals = self._plain.out_avals
        avals = dict(zip(self._kept, self._plain.in_avals, strict=True))
        self.in_avals = tuple(avals.get(i, residuals.HANDLE) for i in range(len(vjp.in_avals)))

    @property
    def plain_kernels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._plain.plain_kernels

    def prepare(self) -> None:
        self._plain.prepare()

    @property
    def composable(self) -> bool:
        return False  # it is only ever executed

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        n_inner = self._vjp.n_inner
        graph = residuals.take_graph(tensors[n_inner])
        if graph is None or not graph.gives(self._vjp.active, (self._in_dims[:n_inner], self._size)):
            return self._plain.execute(*take(tensors, self._kept))
        primals, cotangents = tensors[: n_inner + 1], tensors[n_inner + 1 :]
        dims = self._in_dims[n_inner + 1 :]
        batched = (
            ct.expand(self._size, *ct.shape) if d is None else ct.movedim(d, 0)
            for ct, d in zip(cotangents, dims, strict=True)
        )
        grads = self._vjp.pullback(graph, (*primals, *batched))
        in_dims = take(self._in_dims, self._vjp.active)
        return tuple(g.movedim(d or 0, 0) for g, d in zip(grads, in_dims, strict=True))

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        smaller, operands = self._vjp.select(used)
        return smaller.derive(PerExampleVjp, self._in_dims, self._size), operands

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]]:
        return self._plain, self._kept


def over_batch(call: TorchCall, in_dims: tuple[int | None, ...], size: int) -> TorchCall | None:
    """A call that makes or uses a live graph over a batch axis, if one graph can hold the batch."""
    if isinstance(call, residuals.Save) and call.batch is None and call.base.vmap_method != "batched":
        return call.inner.derive(residuals.Save, call.active, (in_dims, size))
    if isinstance(call, Vjp) and call.live and in_dims[call.n_inner] is None:
        return call.derive(PerExampleVjp, in_dims, size)
    return None
