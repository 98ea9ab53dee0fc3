"""`Base`: the user's torch callable at one signature, on which all other calls are built."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import signature_text
from ..modes.forward_ad import in_forward_mode, stopped_by_no_grad
from ..modes.kernels import UNRECORDED
from ..values.dtypes import is_inexact
from . import scope
from .call import Aval, Checkpoints, Residuals, Tensors, TorchCall, VmapMethod
from .plan import Plan


class Base(TorchCall):
    """A torch callable over flat tensors.

    **Arguments:**

    - `function`: takes one tensor per aval and returns one tensor per output aval.
    - `operand_names`: how errors call the operands.
    - `state`: operands that are state, each with the output that is its new value.
    - `buffers`: operands that could be state; torch has no derivatives by many of them.
    - `device`: where it was traced, and is likely to run.
    - `fakeable`: whether `function` can run on fake tensors (False if it inspects values).
    - `pure`: whether it runs the same ops each time for the same values, so far as a trace tells.
    - `reads`: the values it reads with some operands, if it does nothing but ops with them; None if it may.
    - `captures`: whether it computes with tensors of its own, as far as is known.
    - `precision`: the bytes of the least precise real number among what it computes.
    - `grad_mode`: whether `function` has to run in torch's default grad mode in any case.
    - `foreign`: storages that must not be met, each with what it is (`traceable.py`).
    - `trainable`: operands that are parameters of a module.
    - `differentiates`: whether those must require gradients in any case: `function` differentiates by them itself.
    - `checkpoints`: whether it uses `torch.utils.checkpoint`, and of which kind.
    - `is_loose`: whether torch's autograd has to differentiate each call by itself, without `torch.func`.
    - `fused_kernels`: those it uses that are replaced under higher derivatives (`kernels.py`).
    - `forward_mode`, `vmap_method`, `residuals`, `replay`: the user's options.

    Two facts are found when it is first differentiated (`hidden_writes.py`): `reenters`, whether its backward pass runs
    a part of the module again (`scope.py`), and `has_sparse_gradients`, which torch cannot batch.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        *,
        name: str,
        operand_names: Sequence[str],
        in_avals: Sequence[Aval],
        out_avals: Sequence[Aval],
        state: tuple[tuple[int, int], ...],
        buffers: tuple[int, ...],
        operations: float,
        device: torch.device,
        fakeable: bool,
        pure: bool,
        captures: bool,
        precision: int,
        reads: tuple[Any, ...] | None,
        grad_mode: bool,
        foreign: Mapping[int, str],
        trainable: tuple[int, ...],
        differentiates: bool,
        checkpoints: Checkpoints,
        is_loose: bool,
        fused_kernels: frozenset[str],
        forward_mode: bool,
        vmap_method: VmapMethod,
        residuals: Residuals,
        replay: bool,
    ):
        super().__init__()
        self.base = self
        self.function, self.name, self._operand_names = function, name, operand_names
        self.operations, self.device, self.fused_kernels = operations, device, fused_kernels
        self.fakeable, self.pure, self.reads, self.grad_mode = fakeable, pure, reads, grad_mode
        self.captures, self.precision = captures, precision
        self.in_avals, self.out_avals, self.state = tuple(in_avals), tuple(out_avals), state
        self.in_axes, self.out_axes = ({},) * len(in_avals), ({},) * len(out_avals)
        self.buffers, self.foreign = buffers, foreign
        self._trainable, self._differentiates, self._is_loose = trainable, differentiates, is_loose
        self.checkpoints, self.reenters, self.has_sparse_gradients = checkpoints, checkpoints == "kept", False
        self.forward_mode, self.vmap_method, self.residuals = forward_mode, vmap_method, residuals
        self.wants_replay = replay
        self.warned = False  # about falling back to a loop
        self.lacking: frozenset[str] = frozenset()
        """The fused kernels that turned out to have no derivatives in this call."""

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        return self.run(*tensors)

    def fewer_examples(self) -> "TorchCall":
        return self

    def run(self, *tensors: torch.Tensor) -> Tensors:
        """What the callable returns, in torch's modes of this moment."""
        if in_forward_mode():
            with stopped_by_no_grad():
                return self.function(*self._with_leaves(tensors))
        if not self.grad_mode:
            return self.function(*tensors)
        with torch.enable_grad():  # torch's default: the callable may take gradients itself
            return self.function(*self._with_leaves(tensors))

    def _with_leaves(self, tensors: Tensors) -> Tensors:
        """Operands of which the parameters require gradients, where the callable relies on it."""
        if not (self._differentiates or (self.reenters and scope.current())):
            return tensors
        constant = [i for i in self._trainable if is_inexact(self.in_avals[i].dtype) and not tensors[i].requires_grad]
        leaves = {i: tensors[i].detach().requires_grad_() for i in constant}
        return tuple(leaves.get(i, x) for i, x in enumerate(tensors))

    @property
    def is_loose(self) -> bool:
        """Whether torch's autograd has to differentiate each call by itself, without `torch.func`."""
        return self._is_loose or self.reenters or self.has_sparse_gradients

    @property
    def recordable(self) -> bool:
        return self.wants_replay and self.pure and self.fused_kernels.isdisjoint(UNRECORDED)

    @property
    def why_unrecordable(self) -> str:
        """What makes its ops depend on more than shapes, so far as is known."""
        if not self.fused_kernels.isdisjoint(UNRECORDED):
            return "it uses torch.compile or higher-order ops"
        if self.checkpoints != "none":
            return "it uses torch.utils.checkpoint"
        return "it draws random numbers" if self.fakeable else "it reads values, or draws random numbers by them"

    @property
    def signature(self) -> str:
        """Operands as text, for errors."""
        return signature_text(self._operand_names, [(aval.shape, aval.dtype) for aval in self.in_avals])

    def operand_name(self, index: int) -> str:
        """How errors call an operand of this call or of one derived from it."""
        return f"argument {self._operand_names[index]}" if index < len(self._operand_names) else f"operand {index}"
