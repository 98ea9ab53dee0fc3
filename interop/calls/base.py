"""`Base`: the user's torch callable, on which all other calls are built, and what is known of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import signature_text
from ..modes.forward_ad import in_forward_mode, stopped_by_no_grad
from ..modes.kernels import UNRECORDED
from ..types import Aval, CallOptions, Checkpoints, Operand, Tensors
from ..values.dtypes import is_inexact
from . import scope
from .call import Computation
from .execution import Execution, Planned
from .plan import Plan


@dataclass(frozen=True)
class Facts:
    """What a trace has found of a callable, as far as calls want to know."""

    state: tuple[tuple[int, int], ...]
    """Operands that it changes, each with the output that is its new value."""
    flops: float
    """How many floating-point operations it takes, about."""
    device: torch.device
    """Where it is likely to run."""
    fakeable: bool
    """Whether it can run on fake tensors."""
    pure: bool
    """Whether it is known to do nothing but ops."""
    reads: tuple[Any, ...] | None
    """The values it reads, where a fake run that is given them shows what it does; otherwise None."""
    captures: bool
    """Whether it computes with tensors of its own, as far as is known."""
    precision: int
    """The bytes of the least precise real number among what it computes."""
    grad_mode: bool
    """Whether it has to run in torch's default grad mode in any case."""
    differentiates: bool
    """Whether parameters must require gradients in any case: it differentiates by them itself."""
    checkpoints: Checkpoints
    fused_kernels: frozenset[str]
    """Those it uses that are replaced under higher derivatives (`kernels.py`)."""
    is_loose: bool
    """Whether torch's autograd has to differentiate each call by itself, without `torch.func`."""
    without_autograd: frozenset[str]
    """Ops that it uses that have no kernel for autograd (`lost_gradients.py`)."""
    foreign: Mapping[int, str]
    """Storages that must not be met, each with what it is (`traceable.py`)."""


class Base(Computation):
    """A user's torch callable over flat tensors.

    **Arguments:**

    - `function`: the callable; it returns its outputs and then the new values of state.
    - `name`: how errors call it.
    - `operands`: what it is called with.
    - `out_avals`: what it returns.
    - `facts`: what is known of it.
    - `options`: the user's.

    Three facts are found later: when it is first differentiated (`hidden_writes.py`), `reenters`, whether its backward
    pass runs a part of the module again (`scope.py`), and `has_sparse_gradients`, which torch cannot batch; and when it
    runs, `lacking`, the fused kernels that turn out to have no derivatives in it.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        name: str,
        operands: Sequence[Operand],
        out_avals: Sequence[Aval],
        facts: Facts,
        options: CallOptions,
    ):
        super().__init__()
        self.base = self
        self.function, self.name, self.facts, self.options = function, name, facts, options
        self.state, self.flops = facts.state, facts.flops
        self.in_avals, self.out_avals = tuple(x.aval for x in operands), tuple(out_avals)
        self.in_axes, self.out_axes = ({},) * len(operands), ({},) * len(out_avals)
        self.buffers = tuple(i for i, x in enumerate(operands) if x.is_state)
        self._trainable = tuple(i for i, x in enumerate(operands) if x.is_trainable)
        self._operand_names = [x.name for x in operands]
        self.reenters, self.has_sparse_gradients = facts.checkpoints == "kept", False
        self.lacking: frozenset[str] = frozenset()
        self.warned = False  # about falling back to a loop

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        return self.run(*tensors)

    def fewer_examples(self) -> Computation:
        return self

    def _execution(self) -> Execution:
        return Planned(self)

    def run(self, *tensors: torch.Tensor) -> Tensors:
        """What the callable returns, in torch's modes of this moment."""
        if in_forward_mode():
            with stopped_by_no_grad():
                return self.function(*self._with_leaves(tensors))
        if not self.facts.grad_mode:
            return self.function(*tensors)
        with torch.enable_grad():  # torch's default: the callable may take gradients itself
            return self.function(*self._with_leaves(tensors))

    def _with_leaves(self, tensors: Tensors) -> Tensors:
        """Operands of which the parameters require gradients, where the callable relies on it."""
        if not (self.facts.differentiates or (self.reenters and scope.current())):
            return tensors
        constant = [i for i in self._trainable if is_inexact(self.in_avals[i].dtype) and not tensors[i].requires_grad]
        leaves = {i: tensors[i].detach().requires_grad_() for i in constant}
        return tuple(leaves.get(i, x) for i, x in enumerate(tensors))

    @property
    def is_loose(self) -> bool:
        """Whether torch's autograd has to differentiate each call by itself, without `torch.func`."""
        return self.facts.is_loose or self.reenters or self.has_sparse_gradients

    @property
    def recordable(self) -> bool:
        return self.options.replay and self.facts.pure and self.facts.fused_kernels.isdisjoint(UNRECORDED)

    @property
    def why_unrecordable(self) -> str:
        """What makes its ops depend on more than shapes, so far as is known."""
        if not self.facts.fused_kernels.isdisjoint(UNRECORDED):
            return "it uses torch.compile or higher-order ops"
        if self.facts.checkpoints != "none":
            return "it uses torch.utils.checkpoint"
        return "it draws random numbers" if self.facts.fakeable else "it reads values, or draws random numbers by them"

    @property
    def signature(self) -> str:
        """Operands as text, for errors."""
        return signature_text(self._operand_names, [(aval.shape, aval.dtype) for aval in self.in_avals])

    def operand_name(self, index: int) -> str:
        """How errors call an operand of this call or of one derived from it."""
        return f"argument {self._operand_names[index]}" if index < len(self._operand_names) else f"operand {index}"
