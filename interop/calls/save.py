"""`Save`: a forward call that keeps torch's autograd graph for its backward call.

In a compiled program the graph gives way to a recording of its ops where that is possible (`repeated.py`).

Under vmap one graph holds the whole batch: operands that all examples share enter once for each example (a view,
`Tensor.expand`), so that its gradients are those of the examples.
"""

import torch

from ..replay.repeated import Repeated
from ..types import Tensors
from .batching import vmap
from .call import Computation, TorchCall, graphless
from .derivative import Vjp
from .execution import Execution, planned
from .graph import Batch, Graph, Tape
from .handles import HANDLE, handle_of, number_of
from .residuals import Store, drop, hand_over


class Save(TorchCall):
    """`inner`, with one more output: the handle of its autograd graph with respect to `active`.

    With a `batch`, the same over a batch axis, its graph giving the gradients of each example.
    """

    def __init__(self, inner: Computation, active: tuple[int, ...], batch: Batch | None = None):
        super().__init__()
        self.inner, self.active, self.batch, self.base = inner, active, batch, inner.base
        self._graphless = inner if batch is None else vmap(inner, *batch)
        self._shared = () if batch is None else tuple(i for i in active if batch[0][i] is None)
        self.graphed = self._graphless
        if batch is not None:
            dims, size = batch
            self.graphed = vmap(inner, tuple(0 if i in self._shared else d for i, d in enumerate(dims)), size)
        # What the graph will be used for: by its plan the graph is made, for the values of a plan may be right and its
        # gradients wrong.
        self.gradient = self.graphed.derive(Vjp, active, self.graphed.inexact_outs, False)
        self.flops = self.graphed.flops
        self.name = f"save({self._graphless.name})"
        self.in_avals, self.out_avals = self._graphless.in_avals, (*self._graphless.out_avals, HANDLE)
        self.makes_handle = True

    def _execution(self) -> Execution:
        return SaveExecution(self)

    def dce(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        return None if len(self.out_avals) - 1 in used else self.graphless()

    def graphless(self) -> tuple[Computation, tuple[int, ...]]:
        return self._graphless, tuple(range(len(self.in_avals)))

    def each(self, tensors: Tensors) -> Tensors:
        """Shared operands once for each example."""
        if self.batch is None:
            return tensors
        size = self.batch[1]
        return tuple(x.expand(size, *x.shape) if i in self._shared else x for i, x in enumerate(tensors))


class SaveExecution(Execution):
    """Keeps graphs, or recordings, as long as that is possible and somebody wants them."""

    def __init__(self, call: Save):
        super().__init__(call)
        self._save, self._graphless, self._gradient = call, planned(graphless(call)[0]), planned(call.gradient)
        self._store = Store()
        self._keepable: bool | None = None  # known after the first run

    @property
    def plain_kernels(self) -> frozenset[str]:
        return self._gradient.plain_kernels

    @property
    def recordable(self) -> bool:
        return self._gradient.recordable

    @property
    def recomputes(self) -> bool:
        return self._keepable is False

    def prepare(self) -> None:
        self._gradient.prepare()
        if self.call.base.is_loose and self._save.batch is not None:
            self._keepable = False

    @property
    def _keeps(self) -> bool:
        """Whether to keep graphs: they can be kept, and somebody wants them."""
        return self._keepable is not False and not self._store.is_vain

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        return self._run(tensors, None) if self._keeps else (*self._graphless.execute(*tensors), handle_of(0))

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        if not self._keeps:
            return *self._graphless.repeat(*tensors), handle_of(0)
        return self._run(tensors, self.repeated_on(tensors[0].device))

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        if not self._keeps:
            hand_over(results[-1], 0)
            return self._graphless.replay(operands, results[:-1])
        repeated = self.repeated_on(operands[0].device)
        if repeated is None or repeated.replays is None:
            return False
        kept = repeated.replays[0]([], *operands, *results[:-1])
        hand_over(results[-1], self._store.put(Tape(repeated, kept, self._save.batch)))
        return True

    def _run(self, tensors: Tensors, repeated: Repeated | None) -> Tensors:
        call = self._save
        graph = Graph(call.graphed, call.active, call.batch, repeated)
        try:
            outs = self._gradient.by_plan(call.each(tensors), lambda plan: graph.forward(plan, tensors, call.each))
            keepable = self._keepable or not graph.holds(tensors)
        except Exception:  # torch.func transforms in the callable refuse saved tensor hooks, for instance
            if self._keepable:
                raise
            outs, keepable = self._graphless.execute(*tensors), False  # raises again what is the callable's own fault
        self._keepable = keepable
        return (*outs, handle_of(self._store.put(graph) if keepable else 0))

    def forget(self, results: Tensors) -> None:
        drop(number_of(results[-1]))
        self._keepable = False
