"""Live residuals: torch's autograd graph stays alive between the forward and the backward call.

The forward call (`Save`) stores its graph here and hands JAX a handle, two integers, as the only extra
residual; the backward call takes the graph out by the handle and runs it. A handle that is not here any more
means recompute, which is always correct: the backward ran before, or is batched, or the graph was evicted.

A graph never holds memory of XLA's. Operands enter through an `autograd.Function` that gives views, not as
leaves, and a saved tensor that lives in an operand's storage is kept as (operand, size, stride, offset) and
found again in the operands of the backward call, which have the same values.

Where the handle is unused, JAX's dead-code elimination replaces `Save` by the plain forward; eagerly, a
finalizer of the handle drops the graph. The store is bounded as a last net.

Source: [saved tensor hooks](https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-default-hooks),
[gradient edges](https://docs.pytorch.org/docs/stable/generated/torch.autograd.graph.GradientEdge.html).
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge, saved_tensors_hooks

from .call import Aval, Tensors, TorchCall

HANDLE = Aval((2,), np.dtype(np.int32))
"""A graph's number in base 2**31; 0 stands for no graph (JAX fills residuals of untaken branches with zeros)."""

_CAPACITY = 1 << 16
_graphs: "dict[int, Graph]" = {}
_numbers = itertools.count(1)


def live_graphs() -> int:
    """How many autograd graphs wait for their backward call."""
    return len(_graphs)


class Save(TorchCall):
    """`inner`, with one more output: the handle of its autograd graph with respect to `active`."""

    def __init__(self, inner: TorchCall, active: tuple[int, ...]):
        super().__init__()
        self.inner, self.active, self.base = inner, active, inner.base
        self.plain_kernels, self.operations = inner.plain_kernels, inner.operations
        self.name = f"save({inner.name})"
        self.in_avals, self.out_avals = inner.in_avals, (*inner.out_avals, HANDLE)

    def prepare(self) -> None:
        self.inner.prepare()

    @property
    def composable(self) -> bool:
        return False  # it is only ever executed

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        graph = Graph(self.inner, self.active)
        outs = graph.forward(tensors)
        return (*outs, _store(graph))

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        if len(self.out_avals) - 1 in used:
            return None
        return self.inner, tuple(range(len(self.in_avals)))

    def graphless(self) -> tuple[TorchCall, tuple[int, ...]] | None:
        return self.inner, tuple(range(len(self.in_avals)))


class Graph:
    """The autograd graph of one forward call of `call`."""

    def __init__(self, call: TorchCall, active: tuple[int, ...]):
        self._call, self._active = call, active
        self._operands: Sequence[torch.Tensor] = ()
        self._operand_of: dict[int, int] = {}
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge | None] = []

    def forward(self, operands: Tensors) -> Tensors:
        """Run the call and keep its graph; nothing of `operands` is kept."""
        self._operand_of = {x.untyped_storage()._cdata: i for i, x in enumerate(operands)}
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            # Each operand gets a node of its own (a view's), for torch computes all gradients that flow into a node.
            entered = [x.view_as(x) for x in _Enter.apply(_anchor, *(operands[i] for i in self._active))]
            given = list(operands)
            for i, x in zip(self._active, entered, strict=True):
                given[i] = x
            outs = self._call.run(*given)
        self._inputs = [_edge(x) for x in entered]
        self._outputs = [_edge(y) if y.requires_grad else None for y in outs]
        self._operand_of = {}
        return tuple(y.detach() for y in outs)

    def reaches(self, active: Sequence[int]) -> bool:
        """Whether the graph leads to these operands."""
        return set(active) <= set(self._active)

    def pullback(self, operands: Tensors, active: Sequence[int], outs: Sequence[int], cotangents: Tensors) -> Tensors:
        """The gradients of the operands `active`, given those of the outputs `outs`; the graph is used up."""
        pairs = [(edge, ct) for o, ct in zip(outs, cotangents, strict=True) if (edge := self._outputs[o]) is not None]
        if not pairs:
            return tuple(torch.zeros_like(operands[i]) for i in active)
        inputs = [self._inputs[self._active.index(i)] for i in active]
        self._operands = operands
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
            self._operands = ()
        return tuple(torch.zeros_like(operands[i]) if g is None else g for i, g in zip(active, grads, strict=True))

    def _pack(self, tensor: torch.Tensor) -> Any:
        """What to keep of a tensor that torch saves for the backward pass."""
        operand = self._operand_of.get(_storage(tensor))
        if operand is None:
            return tensor
        if tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        return operand, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        operand, dtype, size, stride, offset = packed
        with torch.no_grad():
            return self._operands[operand].view(dtype).as_strided(size, stride, offset)


class _Enter(torch.autograd.Function):
    """Views of the operands that require gradients without being leaves of the graph, which would hold them."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *xs: torch.Tensor) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError("gradients are taken at this function's outputs, never beyond")


_anchor = torch.zeros((), requires_grad=True)


def _edge(tensor: torch.Tensor) -> GradientEdge:
    node = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):  # one written in Python needs more to stay alive
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _store(graph: Graph) -> torch.Tensor:
    number = next(_numbers)
    _graphs[number] = graph
    while len(_graphs) > _CAPACITY:
        _graphs.pop(next(iter(_graphs)), None)
    return torch.tensor([number >> 31, number & 0x7FFFFFFF], dtype=torch.int32)


def take_graph(handle: torch.Tensor | None) -> Graph | None:
    """Remove and return the graph of a handle, if it is still there."""
    if handle is None:
        return None
    high, low = handle.tolist()
    return _graphs.pop((high << 31) | low, None)


def discard(handle: torch.Tensor | None) -> None:
    """Drop the graph of a handle."""
    take_graph(handle)


def drop_with(handle: jax.Array) -> None:
    """Drop the graph when this handle array dies: for eager calls, whose backward may never come."""
    high, low = np.asarray(handle).tolist()
    weakref.finalize(handle, _graphs.pop, (high << 31) | low, None).atexit = False
