"""Live residuals: torch's autograd graph stays alive between the forward and the backward call.

The forward call (`Save`) stores its graph here and hands JAX a handle, two integers, as the only extra
residual; the backward call takes the graph out by the handle and runs it. A handle that is not here any more
means recompute, which is always correct: the backward ran before, or is batched, or the graph was evicted.

In a compiled program the graph gives way to a recording of its ops where that is possible (`repeated.py`).

Where the handle is unused, JAX's dead-code elimination replaces `Save` by the plain forward; eagerly, a
finalizer of the handle drops the graph; one that is not asked for all the same is dropped when it has waited long.

Under vmap one graph holds the whole batch: `Save` enters operands that all examples share once for each example (a
view, `Tensor.expand`), so that its gradients are those of the examples.
"""

import itertools
import weakref
from collections.abc import Callable

import jax
import torch

from .batching import vmap
from .call import Tensors, TorchCall
from .graph import Batch, Graph, Tape
from .handles import HANDLE, handle_of, number_of, number_of_array, write_handle
from .hidden_writes import hidden_writes
from .repeated import Repeated

_UNASKED, _ROUNDS, _DISCARDED = 64, 16, 3
_graphs: "dict[int, tuple[Kept, _Shelf]]" = {}
_numbers = itertools.count(1)
Kept = Graph | Tape


def live_graphs() -> int:
    """How many autograd graphs wait for their backward call."""
    return len(_graphs)


class Save(TorchCall):
    """`inner`, with one more output: the handle of its autograd graph with respect to `active`.

    With a `batch`, the same over a batch axis, its graph giving the gradients of each example.
    """

    def __init__(self, inner: TorchCall, active: tuple[int, ...], batch: Batch | None = None):
        super().__init__()
        self.inner, self.active, self.batch, self.base = inner, active, batch, inner.base
        self._plain = inner if batch is None else vmap(inner, *batch)
        self._shared = () if batch is None else tuple(i for i in active if batch[0][i] is None)
        self._graphed = self._plain
        if batch is not None:
            dims, size = batch
            self._graphed = vmap(inner, tuple(0 if i in self._shared else d for i, d in enumerate(dims)), size)
        self.operations = self._graphed.operations
        self.name = f"save({self._plain.name})"
        self.in_avals, self.out_avals = self._plain.in_avals, (*self._plain.out_avals, HANDLE)
        self._shelf = _Shelf()
        self._keepable: bool | None = None  # known after the first run

    @property
    def plain_kernels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._graphed.plain_kernels

    def prepare(self) -> None:
        self._graphed.prepare()
        self.base.derive(hidden_writes)

    @property
    def composable(self) -> bool:
        return False  # it is only ever executed

    @property
    def recordable(self) -> bool:
        return self._graphed.recordable and not self.base.derive(hidden_writes)

    @property
    def _keeps(self) -> bool:
        """Whether to keep graphs: they can be kept, and somebody wants them."""
        return self._keepable is not False and not self._shelf.is_vain

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        return self._save(tensors, None) if self._keeps else (*self._plain.execute(*tensors), handle_of(0))

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        if not self._keeps:
            return *self._plain.repeat(*tensors), handle_of(0)
        return self._save(tensors, self.repeated if tensors[0].is_cpu else None)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        if not self._keeps:
            write_handle(results[-1], 0)
            return self._plain.replay(operands, results[:-1])
        repeated = self.repeated
        if repeated is None or repeated.replays is None:
            return False
        kept = repeated.replays[0]([], *operands, *results[:-1])
        write_handle(results[-1], self._shelf.put(Tape(repeated, kept, self.batch)))
        return True

    def _save(self, tensors: Tensors, repeated: Repeated | None) -> Tensors:
        graph = Graph(self._graphed, self.active, self.batch, repeated)
        try:
            outs = graph.forward(tensors, self._each)
            keepable = self._keepable or not graph.holds(tensors)
        except Exception:  # torch.func transforms in the callable refuse saved tensor hooks, for instance
            if self._keepable:
                raise
            outs, keepable = self._plain.execute(*tensors), False  # raises again what is the callable's own fault
        self._keepable = keepable
        return (*outs, handle_of(self._shelf.put(graph) if keepable else 0))

    def forget(self, results: Tensors) -> None:
        _drop(number_of(results[-1]))
        self._keepable = False

    def _each(self, tensors: Tensors) -> Tensors:
        """Shared operands once for each example."""
        if self.batch is None:
            return tensors
        size = self.batch[1]
        return tuple(x.expand(size, *x.shape) if i in self._shared else x for i, x in enumerate(tensors))

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        return None if len(self.out_avals) - 1 in used else self.graphless()

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]]:
        return self._plain, tuple(range(len(self.in_avals)))


class _Shelf:
    """The graphs of one `Save` that wait for their backward call.

    Some wait in vain: `cond` under vmap runs both branches, and a handle that no example chose is lost. Dropping a
    graph is always correct, so two kinds are: the oldest of many where none was ever asked for, and those left from
    many rounds ago, a round being forward calls followed by backward ones. Where the graphs go to forward mode, which
    has no use for them, none is kept after the first few.
    """

    def __init__(self) -> None:
        self._round_of: dict[int, int] = {}
        self._round, self._taking, self._asked, self._discarded = 0, False, False, 0

    @property
    def is_vain(self) -> bool:
        """Whether graphs were given away unused, and none was ever asked for."""
        return self._discarded >= _DISCARDED and not self._asked

    def put(self, graph: Kept) -> int:
        """Keep a graph; returns its number."""
        if self._taking:
            self._taking, self._round = False, self._round + 1
            for number, put_in in self._round_of.copy().items():
                if put_in < self._round - _ROUNDS:
                    _drop(number)
        number = next(_numbers)
        self._round_of[number] = self._round
        _graphs[number] = graph, self
        if not self._asked and len(self._round_of) > _UNASKED:
            _drop(next(iter(self._round_of.copy())))
        return number

    def remove(self, number: int) -> None:
        """Forget a graph."""
        self._round_of.pop(number, None)

    def take(self, number: int) -> None:
        """A graph is taken out to be used."""
        self.remove(number)
        self._taking = self._asked = True

    def discard(self, number: int) -> None:
        """A graph is given away unused."""
        self.remove(number)
        self._discarded += 1


def take_graph(handle: torch.Tensor | None) -> Kept | None:
    """Remove and return the graph of a handle, if it is still there."""
    if handle is None:
        return None
    return _drop(number_of(handle), _Shelf.take)


def is_kept(handle: torch.Tensor) -> bool:
    """Whether a graph or tape waits for this handle."""
    return number_of(handle) in _graphs


def take_tape(handle: torch.Tensor, active: tuple[int, ...], outs: tuple[int, ...], batch: Batch | None) -> Tape | None:
    """Remove and return what the handle stands for, if it is a tape that gives these gradients."""
    number = number_of(handle)
    tape, _ = _graphs.get(number, (None, None))
    if not isinstance(tape, Tape) or not tape.gives(active, outs, batch):
        return None
    _drop(number, _Shelf.take)
    return tape


def discard(handle: torch.Tensor | None) -> None:
    """Drop the graph of a handle, for which there is no use."""
    if handle is not None:
        _drop(number_of(handle), _Shelf.discard)


def drop_with(handle: jax.Array) -> None:
    """Drop the graph when this handle array dies: for eager calls, whose backward may never come."""
    weakref.finalize(handle, _drop, number_of_array(handle)).atexit = False


def _drop(number: int, how: Callable[[_Shelf, int], None] = _Shelf.remove) -> Kept | None:
    graph, shelf = _graphs.pop(number, (None, None))
    if shelf is not None:
        how(shelf, number)
    return graph
