"""What a forward call keeps for its backward call: torch's autograd graph, or what a recording of both keeps.

A graph never holds memory of XLA's: the leaves through which operands enter forget it, and a saved tensor that lives in
an operand's storage is kept as (operand, size, stride, offset) and found again in the operands of the backward call,
which have the same values.

Source: [saved tensor hooks](https://docs.pytorch.org/docs/stable/autograd.html#saved-tensors-default-hooks),
[gradient edges](https://docs.pytorch.org/docs/stable/generated/torch.autograd.graph.GradientEdge.html).
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge, saved_tensors_hooks

from ..internals.ops import FUNCTION_BASE
from ..modes.kernels import compiling
from ..replay.repeated import Repeated
from ..types import Tensors
from ..values.memory import storage_of
from .call import Computation
from .plan import Plan
from .reverse import dense
from .scope import Scope

Batch = tuple[tuple[int | None, ...], int]
"""The batch axes of a call's operands and the size of the batch."""


class Tape:
    """What the replay of a forward call keeps for the replay of its backward call."""

    def __init__(self, repeated: Repeated, kept: list[torch.Tensor], batch: Batch | None):
        self._repeated, self._kept, self._batch = repeated, kept, batch

    def gives(self, active: tuple[int, ...], outs: tuple[int, ...], batch: Batch | None) -> bool:
        """Whether it gives the gradients of these operands by these outputs, for each example of the batch."""
        return batch == self._batch and (active, outs) == self._repeated.direction

    def replay(self, operands: Tensors, cotangents: Iterable[torch.Tensor], results: Iterable[torch.Tensor]) -> None:
        """Write the gradients into `results`."""
        assert self._repeated.replays is not None
        self._repeated.replays[1](self._kept, *operands, *cotangents, *results)


class Graph:
    """The autograd graph of one forward call of `call`, made for the `batch` of a `Save`."""

    def __init__(self, call: Computation, active: tuple[int, ...], batch: Batch | None, repeated: Repeated | None):
        self._call, self._active, self._batch = call, active, batch
        self._repeated, self._recorder = repeated, None if repeated is None else repeated.recorder()
        self._saved, self._scope = _Saved(), Scope() if call.base.reenters else None
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge | None] = []

    def forward(self, plan: Plan, tensors: Tensors, operands: Callable[[Tensors], Tensors]) -> Tensors:
        """Run the call on the operands that are made of `tensors`, and keep its graph; nothing of them is kept."""
        return self._recorded(tensors, lambda: self._forward(plan, operands(tensors)))

    def _forward(self, plan: Plan, operands: Tensors) -> Tensors:
        self._saved.operand_of = {storage_of(x): i for i, x in enumerate(operands)}
        self._saved.operands = operands  # the call may itself go backward
        compiled = compiling(self._call.base.facts.fused_kernels, self._saved.pack)
        with compiled as pack, torch.enable_grad(), saved_tensors_hooks(pack, self._saved.unpack):
            entered = [_enter(operands[i]) for i in self._active]
            given = list(operands)
            for i, x in zip(self._active, entered, strict=True):
                given[i] = x
            try:
                with self._scope.active() if self._scope else _NO_SCOPE:
                    outs = self._call.compute(plan, *given)
            finally:
                self._saved.operands = ()
        self._inputs = [_edge(x) for x in entered]
        self._outputs = [_edge(y) if y.requires_grad else None for y in outs]
        self._saved.operand_of = {}
        outs = tuple(y.detach() for y in outs)
        if self._scope:
            self._scope.put_by(operands, entered)
        return outs

    def _recorded(self, inputs: Tensors, work: Callable[[], Tensors]) -> Tensors:
        if self._recorder is None or self._repeated is None:
            return work()
        return self._repeated.record(self._recorder, inputs, work)

    def holds(self, operands: Sequence[torch.Tensor]) -> bool:
        """Whether the call made leaves of operands, to differentiate by them itself: the graph has their memory."""
        storages = {storage_of(x) for x in operands}
        seen: set[Any] = set()
        nodes = [edge.node for edge in self._outputs if edge is not None]
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and storage_of(leaf) in storages:
                return True
            nodes += [following for following, _ in node.next_functions if following is not None]
        return False

    def gives(self, active: tuple[int, ...], batch: Batch | None) -> bool:
        """Whether the graph gives the gradients of these operands, for each example of the batch."""
        return batch == self._batch and set(active) <= set(self._active)

    def pullback(
        self, operands: Tensors, active: tuple[int, ...], outs: tuple[int, ...], cotangents: Tensors
    ) -> Tensors:
        """The gradients of the operands `active`, given those of the outputs `outs`; the graph is used up."""
        given = (*operands, *cotangents)
        grads = self._recorded(given, lambda: self._pullback(operands, active, outs, cotangents))
        if self._scope:
            self._scope.close()
        if self._recorder is not None and self._repeated is not None:
            self._inputs, self._outputs = [], []  # makes room for the proof
            self._repeated.offer(self._recorder, given, (active, outs))
        return grads

    def _pullback(self, operands: Tensors, active: Sequence[int], outs: Sequence[int], cotangents: Tensors) -> Tensors:
        pairs = [(edge, ct) for o, ct in zip(outs, cotangents, strict=True) if (edge := self._outputs[o]) is not None]
        if not pairs:
            return tuple(self._zeros(i, operands) for i in active)
        inputs = [self._inputs[self._active.index(i)] for i in active]
        self._saved.operands = operands
        again = self._scope.taken_up(operands) if self._scope else _NO_SCOPE
        try:
            # What torch.autograd.grad calls after checks of shapes and dtypes, which are right here by construction.
            with again:
                grads = _engine_run_backward(
                    tuple(edge for edge, _ in pairs),
                    tuple(ct for _, ct in pairs),
                    self._recorder is not None,  # retain_graph: to run it again if an op fails in a dispatch mode
                    False,  # create_graph
                    tuple(inputs),
                    True,  # allow_unreachable
                    accumulate_grad=False,
                )
        finally:
            self._saved.operands = ()
        return tuple(self._zeros(i, operands) if g is None else dense(g) for i, g in zip(active, grads, strict=True))

    def _zeros(self, operand: int, operands: Tensors) -> torch.Tensor:
        return operands[operand].new_zeros(self._call.in_avals[operand].shape)


_NO_SCOPE = contextlib.nullcontext()


class _Saved:
    """What a graph saves for the backward pass; its nodes hold this, so it holds none of them: the cycle would leak."""

    def __init__(self) -> None:
        self.operands: Sequence[torch.Tensor] = ()
        self.operand_of: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        """What to keep of a tensor that torch saves."""
        operand = self.operand_of.get(storage_of(tensor))
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
        if not self.operands:
            raise RuntimeError("What this graph saved is found in operands, of which it has none now.")
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
    if node is None or isinstance(node, FUNCTION_BASE):  # one written in Python needs more to stay alive
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)
