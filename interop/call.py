"""`TorchCall`: a torch callable over flat tensors, closed under differentiation and batching.

The kinds, each built on another call down to the user's callable:

- `Base(f)`: a user's torch callable;
- `Jvp(f, active, outs)`: `(x, t) -> J t`, linear in `t` (`derivative.py`);
- `Vjp(f, active, outs)`: `(x, ct) -> J^T ct`, linear in `ct`; each is the other's transpose;
- `Save(f, active)`: `f`, keeping torch's autograd graph for one of the above (`residuals.py`);
- `Vmap(f, in_dims, out_dims)`: `f` over a batch axis (`batching.py`).

How a call is carried out depends on what torch supports, decided once, when the call is compiled, by
trial runs on fake tensors (`trial.py`): `torch.func` transforms where they have the rules, otherwise
`torch.autograd` and loops, which always work.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import jax
import torch

from . import ambient
from .dtypes import is_inexact
from .errors import signature_text
from .kernels import UNRECORDED, chosen
from .repeated import LARGE, Repeated
from .tangents import in_forward_mode, stopped_by_no_grad

Aval = jax.ShapeDtypeStruct
Tensors = tuple[torch.Tensor, ...]
VmapMethod = Literal["auto", "vmap", "batched", "loop"]
Residuals = Literal["live", "recompute"]
Linearized = tuple["TorchCall", tuple[int, ...], tuple[int, ...]]
Derived = TypeVar("Derived")


class TorchCall:
    """A pure function of flat tensors at fixed shapes and dtypes; compared by identity."""

    name: str
    in_avals: tuple[Aval, ...]
    out_avals: tuple[Aval, ...]
    base: "Base"
    """The user's callable underneath."""
    state: tuple[tuple[int, int], ...] = ()
    """Operands that are state, each with the output that is its new value, through which no gradient flows."""
    linear_operands: frozenset[int] = frozenset()
    """Operands the call is (jointly) linear in, given the others."""
    differentiated: bool = False
    plain_kernels: bool = False
    """Whether running the call may ask torch for derivatives that fused kernels lack."""

    operations: float
    """How many floating-point operations the call takes, about."""

    def __init__(self) -> None:
        self._derived: dict[Any, Any] = {}

    def run(self, *tensors: torch.Tensor) -> Tensors:
        """Compute, in a way that composes with an enclosing transform."""
        raise AssertionError("abstract")

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        """Compute, outermost: called by the compiled program under `torch.no_grad()`."""
        return self.run(*tensors)

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        """`execute`, for one of many runs."""
        return self.run_repeatedly(self.execute, tensors)

    def run_repeatedly(self, work: Callable[..., Tensors], tensors: Tensors) -> Tensors:
        """What `work` returns on `tensors`, recorded if that is still to be done."""
        repeated = self.repeated if tensors and tensors[0].is_cpu else None
        return work(*tensors) if repeated is None else repeated.run(work, tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        """Write into `results` what earlier runs give on these operands; False where they cannot tell."""
        repeated = self.repeated
        if repeated is None or repeated.replays is None:
            return False
        repeated.replays[0]([], *operands, *results)
        return True

    @cached_property
    def repeated(self) -> Repeated | None:
        """Recordings of the call, if it may be recorded."""
        return Repeated() if self.operations <= LARGE and self.recordable else None

    @property
    def recordable(self) -> bool:
        """Whether its ops do not depend on values, so far as is known."""
        raise AssertionError("abstract")

    def forget(self, results: Tensors) -> None:
        """Give up what a run kept for later calls, which holds operands: the next ones keep nothing."""

    def prepare(self) -> None:
        """Decide how to run, before the first run: trial runs cannot nest."""

    @property
    def composable(self) -> bool:
        """Whether `run` may stand inside a `torch.func` transform."""
        raise AssertionError("abstract")

    def derive(self, kind: Callable[..., Derived], *statics: Any) -> Derived:
        """`kind(self, *statics)`, one object per set of statics, so that JAX's caches hit."""
        key = (kind, *statics)
        if key not in self._derived:
            self._derived[key] = kind(self, *statics)
        return self._derived[key]

    @property
    def inexact_outs(self) -> tuple[int, ...]:
        """Outputs that carry tangents."""
        constant = {out for _, out in self.state}
        return tuple(i for i, aval in enumerate(self.out_avals) if i not in constant and is_inexact(aval.dtype))

    def linearize(self, active: tuple[int, ...]) -> Linearized | None:
        """The tangent map of a call that is linear in the `active` operands; None if it is not.

        Returns a call, the operands of `self` it needs first, and the outputs of `self` whose
        tangents it gives when the tangents of `active` follow them.
        """
        return None

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...]]":
        """The transpose with respect to `linear` operands, for cotangents of `outs`.

        Returns a call and the operands of `self` it needs first; cotangents follow them.
        """
        raise TypeError(
            f"{self.name} cannot be transposed: torchleaf does not know it to be linear. "
            "Use jax.vjp, which gives the transpose of its derivative."
        )

    def select(self, used: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...]] | None":
        """A cheaper call and the operands it needs; None if there is none.

        It gives the `used` outputs, or else the first few that hold all of them.
        """
        return None

    def graphless(self) -> "tuple[TorchCall, tuple[int, ...]] | None":
        """For a call that keeps or uses a live autograd graph: the one that does not, and the operands it needs."""
        return None

    def __repr__(self) -> str:
        return self.name


class Base(TorchCall):
    """A torch callable over flat tensors.

    **Arguments:**

    - `function`: takes one tensor per aval and returns one tensor per output aval.
    - `operand_names`: how errors call the operands.
    - `state`: operands that are state, each with the output that is its new value.
    - `buffers`: operands that could be state; torch has no derivatives by many of them.
    - `fakeable`: whether `function` can run on fake tensors (False if it inspects values).
    - `pure`: whether it runs the same ops each time for the same values, so far as a trace tells.
    - `reads`: the values it reads with some operands, if it does nothing but ops with them; None if it may.
    - `grad_mode`: whether `function` has to run in torch's default grad mode in any case.
    - `fused_kernels`: those it uses that are replaced under higher derivatives (`kernels.py`).
    - `forward_mode`, `vmap_method`, `residuals`, `replay`: the user's options.
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
        fakeable: bool,
        pure: bool,
        reads: tuple[Any, ...] | None,
        grad_mode: bool,
        fused_kernels: frozenset[str],
        forward_mode: bool,
        vmap_method: VmapMethod,
        residuals: Residuals,
        replay: bool,
    ):
        super().__init__()
        self.base = self
        self.function, self.name, self._operand_names = function, name, operand_names
        self.operations, self.fused_kernels = operations, fused_kernels
        self.fakeable, self.pure, self.reads, self.grad_mode = fakeable, pure, reads, grad_mode
        self.in_avals, self.out_avals, self.state = tuple(in_avals), tuple(out_avals), state
        self.buffers = buffers
        self.forward_mode, self.vmap_method, self.residuals = forward_mode, vmap_method, residuals
        self.wants_replay = replay
        self.warned = False  # about falling back to a loop

    def run(self, *tensors: torch.Tensor) -> Tensors:
        if in_forward_mode():
            with stopped_by_no_grad():
                return self.function(*tensors)
        if not self.grad_mode:
            return self.function(*tensors)
        with torch.enable_grad():  # torch's default: the callable may take gradients itself
            return self.function(*tensors)

    @property
    def composable(self) -> bool:
        return self.fakeable

    @property
    def recordable(self) -> bool:
        return self.wants_replay and self.pure and self.fused_kernels.isdisjoint(UNRECORDED)

    @property
    def signature(self) -> str:
        """Operands as text, for errors."""
        return signature_text(self._operand_names, [(aval.shape, aval.dtype) for aval in self.in_avals])

    def operand_name(self, index: int) -> str:
        """How errors call an operand of this call or of one derived from it."""
        return f"argument {self._operand_names[index]}" if index < len(self._operand_names) else f"operand {index}"


def execute(call: TorchCall, *tensors: torch.Tensor, repeats: bool) -> Tensors:
    """Run a call outermost, on the thread of the compiled program; `repeats`: of one that runs many times."""
    run, kernels = call.repeat if repeats else call.execute, call.base.fused_kernels
    with ambient.neutral(), torch.no_grad():
        if not kernels:
            return run(*tensors)
        with chosen(kernels, inference=call is call.base, plain=call.plain_kernels):
            return run(*tensors)


def take(items: Sequence[Any], indices: Sequence[int]) -> tuple[Any, ...]:
    """The items at `indices`."""
    return tuple(items[i] for i in indices)
