"""Live residuals: torch's autograd graph stays alive between the forward and the backward call.

The forward call (`Save`) stores its graph here and hands JAX a handle, two integers, as the only extra
residual; the backward call takes the graph out by the handle and runs it. A handle that is not here any more
means recompute, which is always correct: the backward ran before, or is batched, or the graph was evicted.

A graph never holds memory of XLA's: the leaves through which operands enter forget it, and a saved tensor that lives in
an operand's storage is kept as (operand, size, stride, offset) and found again in the operands of the backward call,
which have the same values.

Where the handle is unused, JAX's dead-code elimination replaces `Save` by the plain forward; eagerly, a
finalizer of the handle drops the graph; one that is not asked for all the same is dropped when it has waited long.

Under vmap one graph holds the whole batch: `Save` enters operands that all examples share once for each example (a
view, `Tensor.expand`), so that its gradients are those of the examples.

Source: [saved tensor hooks](https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-default-hooks),
[gradient edges](https://docs.pytorch.org/docs/stable/generated/torch.autograd.graph.GradientEdge.html).
"""

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge, saved_tensors_hooks

from .batching import vmap
from .call import Aval, Tensors, TorchCall
from .hidden_writes import hidden_writes
from .kernels import compiling

HANDLE = Aval((2,), np.dtype(np.int32))
"""A graph's number in base 2**31; 0 stands for no graph (JAX fills residuals of untaken branches with zeros)."""

_UNASKED, _ROUNDS = 64, 16
_LOW = 0x7FFFFFFF
_graphs: "dict[int, tuple[Graph, _Shelf]]" = {}
_numbers = itertools.count(1)
Batch = tuple[tuple[int | None, ...], int]
"""The batch axes of a call's operands and the size of the batch."""


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

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        if self._keepable is False:
            return (*self._plain.execute(*tensors), _no_graph())
        given = list(tensors)
        for i in self._shared:
            given[i] = given[i].expand(self.batch[1], *given[i].shape)  # pyright: ignore[reportOptionalSubscript]
        graph = Graph(self._graphed, self.active, self.batch)
        try:
            outs = graph.forward(tuple(given))
            keepable = self._keepable or not graph.holds(given)
        except Exception:  # torch.func transforms in the callable refuse saved tensor hooks, for instance
            if self._keepable:
                raise
            outs, keepable = self._plain.execute(*tensors), False  # raises again what is the callable's own fault
        self._keepable = keepable
        return (*outs, self._shelf.put(graph) if keepable else _no_graph())

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        return None if len(self.out_avals) - 1 in used else self.graphless()

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]]:
        return self._plain, tuple(range(len(self.in_avals)))


def _no_graph() -> torch.Tensor:
    return torch.zeros(HANDLE.shape, dtype=torch.int32)


class _Shelf:
    """The graphs of one `Save` that wait for their backward call.

    Some wait in vain: `cond` under vmap runs both branches, and a handle that no example chose is lost. Dropping a
    graph is always correct, so two kinds are: the oldest of many where none was ever asked for, and those left from
    many rounds ago, a round being forward calls followed by backward ones.
    """

    def __init__(self) -> None:
        self._round_of: dict[int, int] = {}
        self._round, self._taking, self._asked = 0, False, False

    def put(self, graph: "Graph") -> torch.Tensor:
        """Keep a graph; returns its handle."""
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
        return torch.tensor([number >> 31, number & _LOW], dtype=torch.int32)

    def remove(self, number: int, *, asked: bool) -> None:
        """Forget a graph that was taken out."""
        self._round_of.pop(number, None)
        if asked:
            self._taking = self._asked = True


def take_graph(handle: torch.Tensor | None) -> "Graph | None":
    """Remove and return the graph of a handle, if it is still there."""
    if handle is None:
        return None
    high, low = handle.tolist()
    return _drop((high << 31) | low, asked=True)


def discard(handle: torch.Tensor | None) -> None:
    """Drop the graph of a handle."""
    take_graph(handle)


def drop_with(handle: jax.Array) -> None:
    """Drop the graph when this handle array dies: for eager calls, whose backward may never come."""
    high, low = np.asarray(handle).tolist()
    weakref.finalize(handle, _drop, (high << 31) | low).atexit = False


def _drop(number: int, *, asked: bool = False) -> "Graph | None":
    graph, shelf = _graphs.pop(number, (None, None))
    if shelf is not None:
        shelf.remove(number, asked=asked)
    return graph


class Graph:
    """The autograd graph of one forward call of `call`, made for the `batch` of a `Save`."""

    def __init__(self, call: TorchCall, active: tuple[int, ...], batch: Batch | None):
        self._call, self._active, self._batch = call, active, batch
        self._saved = _Saved()
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge | None] = []

    def forward(self, operands: Tensors) -> Tensors:
        """Run the call and keep its graph; nothing of `operands` is kept."""
        self._saved.operand_of = {_storage(x): i for i, x in enumerate(operands)}
        self._saved.operands = operands  # the call may itself go backward
        compiled = compiling(self._call.base.fused_kernels, self._saved.pack)
        with compiled as pack, torch.enable_grad(), saved_tensors_hooks(pack, self._saved.unpack):
            entered = [_enter(operands[i]) for i in self._active]
            given = list(operands)
            for i, x in zip(self._active, entered, strict=True):
                given[i] = x
            try:
                outs = self._call.run(*given)
            finally:
                self._saved.operands = ()
        self._inputs = [_edge(x) for x in entered]
        self._outputs = [_edge(y) if y.requires_grad else None for y in outs]
        self._saved.operand_of = {}
        return tuple(y.detach() for y in outs)

    def holds(self, operands: Sequence[torch.Tensor]) -> bool:
        """Whether the call made leaves of operands, to differentiate by them itself: the graph has their memory."""
        storages = {_storage(x) for x in operands}
        seen: set[Any] = set()
        nodes = [edge.node for edge in self._outputs if edge is not None]
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and _storage(leaf) in storages:
                return True
            nodes += [following for following, _ in node.next_functions if following is not None]
        return False

    def gives(self, active: Sequence[int], batch: Batch | None) -> bool:
        """Whether the graph gives the gradients of these operands, for each example of the batch."""
        return batch == self._batch and set(active) <= set(self._active)

    def pullback(self, operands: Tensors, active: Sequence[int], outs: Sequence[int], cotangents: Tensors) -> Tensors:
        """The gradients of the operands `active`, given those of the outputs `outs`; the graph is used up."""
        pairs = [(edge, ct) for o, ct in zip(outs, cotangents, strict=True) if (edge := self._outputs[o]) is not None]
        if not pairs:
            return tuple(self._zeros(i, operands) for i in active)
        inputs = [self._inputs[self._active.index(i)] for i in active]
        self._saved.operands = operands
        try:
            # What torch.autograd.grad calls after checks of shapes and dtypes, which are right here by construction.
            grads = _engine_run_backward(
                tuple(edge for edge, _ in pairs),
                tuple(ct for _, ct in pairs),
                False,  # retain_graph
                False,  # create_graph
                tuple(inputs),
                True,  # allow_unreachable
                accumulate_grad=False,
            )
        finally:
            self._saved.operands = ()
        return tuple(self._zeros(i, operands) if g is None else g for i, g in zip(active, grads, strict=True))

    def _zeros(self, operand: int, operands: Tensors) -> torch.Tensor:
        return operands[operand].new_zeros(self._call.in_avals[operand].shape)


class _Saved:
    """What a graph saves for the backward pass; its nodes hold this, so it holds none of them: the cycle would leak."""

    def __init__(self) -> None:
        self.operands: Sequence[torch.Tensor] = ()
        self.operand_of: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        """What to keep of a tensor that torch saves."""
        operand = self.operand_of.get(_storage(tensor))
        if operand is None:
            return tensor.detach()  # an output holds the node that saves it
        if tensor.is_conj() or tensor.is_neg():
            return tensor.detach().clone()
        return operand, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor that was packed."""
        if isinstance(packed, torch.Tensor):
            return packed
        operand, dtype, size, stride, offset = packed
        tensor = self.operands[operand]
        return (tensor if tensor.dtype == dtype else tensor.view(dtype)).as_strided(size, stride, offset)


def _enter(operand: torch.Tensor) -> torch.Tensor:
    """A view of an operand, with a node of its own at which gradients are taken.

    What it is a view of is a leaf of the graph, which the graph holds; the leaf forgets the operand's memory.
    """
    leaf = operand.detach().requires_grad_()
    view = leaf.view_as(leaf)
    leaf.data = _nothing(operand.dtype, operand.device)
    return view


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _edge(tensor: torch.Tensor) -> GradientEdge:
    node = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):  # one written in Python needs more to stay alive
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
