"""`TorchCall`: a torch callable over flat tensors, closed under differentiation and batching.

The kinds, each built on another call down to the user's callable:

- `Base(f)`: a user's torch callable (`base.py`);
- `Jvp(f, active, outs)`: `(x, t) -> J t`, linear in `t` (`derivative.py`);
- `Vjp(f, active, outs)`: `(x, ct) -> J^T ct`, linear in `ct`; each is the other's transpose;
- `Save(f, active)`: `f`, keeping torch's autograd graph for one of the above (`residuals.py`);
- `Vmap(f, in_dims, out_dims)`: `f` over a batch axis (`batching.py`).

How a call is carried out is its plan (`plan.py`): `torch.func` transforms where they have the rules and have proven
right, otherwise `torch.autograd` and loops, which always are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import quote
from ..internals import NO_EVALUATION_BACKWARD
from ..modes import ambient
from ..modes.kernels import FUSED, NONE, chosen, lacking_derivatives, refuse_scripted
from ..replay.repeated import LARGE, LARGE_ON_GPU, Repeated
from ..types import Aval, Tensors
from ..values.dtypes import is_inexact
from . import scope
from .choice import Choice
from .plan import Plan, Transform

if TYPE_CHECKING:
    from .base import Base

Linearized = tuple["TorchCall", tuple[int, ...], tuple[int, ...]]
Derived = TypeVar("Derived")
Axes = tuple[dict[int, int], ...]


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
    directions: frozenset[int] = frozenset()
    """Operands that are tangents or cotangents, of this derivative or of one within."""
    differentiated: bool = False
    handle_operand: int | None = None
    """The operand that is a handle."""
    makes_handle: bool = False
    """Whether the last output is one."""

    depth: int = 0
    """How many levels it is away from the user's callable."""
    transform: Transform | None = None
    """The transform of torch.func that could carry out this level."""
    in_axes: Axes
    out_axes: Axes
    """Of each operand and of each output, the axes that are batches, by the level whose examples they number."""

    operations: float
    """How many floating-point operations the call takes, about."""

    def __init__(self) -> None:
        self._derived: dict[Any, Any] = {}
        self._repeated: dict[torch.device, Repeated] = {}
        self.choice = Choice()

    def levels(self) -> "list[TorchCall]":
        """The call, the one it is built on, and so forth; without the user's callable."""
        return []

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        """Compute by a plan."""
        raise AssertionError("abstract")

    def fewer_examples(self) -> "TorchCall":
        """The same call with at most two examples in each batch."""
        raise AssertionError("abstract")

    def tell_of_loop(self, because: str) -> None:
        """Of a batch: say that it runs as a loop, or refuse to."""

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        """Compute, outermost: called by the compiled program under `torch.no_grad()`."""
        return self.by_plan(tensors, lambda plan: self.compute(plan, *tensors))

    def by_plan(self, tensors: Tensors, work: Callable[[Plan], Tensors]) -> Tensors:
        """What `work` returns with a plan that is right on operands, or on the first few of them."""
        plan = self.settled(tensors)
        try:
            return work(plan)
        except RuntimeError as exc:  # torch may take other branches than in the proof
            if not plan.core or not str(exc).startswith("vmap: "):
                raise
            self.choice.reject(self, plan, quote(exc))
        return self.by_plan(tensors, work)

    def sampled(self, tensors: Tensors) -> "tuple[TorchCall, Tensors]":
        """The same call with at most two examples in each batch, and those of its operands, or of the first few."""
        call = self.fewer_examples()
        return call, tuple(map(_ends, tensors, self.in_axes))

    def settled(self, tensors: Tensors) -> Plan:
        """The plan of the call, proven on operands if it is not yet."""
        if not self.choice.is_final:
            self.choice.settle(self, tensors)
        return self.choice.plan

    @property
    def plain_kernels(self) -> frozenset[str]:
        """The fused kernels that the call has to do without, since it asks torch for rules that they lack."""
        lacking = FUSED if self.choice.plan.core > 0 else self.base.lacking if self.derivatives else NONE
        return self.base.facts.fused_kernels & (lacking | self._lacking_derivatives)

    @cached_property
    def _lacking_derivatives(self) -> frozenset[str]:
        """The fused kernels that lack the derivatives that the call takes."""
        # What is differentiated after a Jacobian-vector product by reverse mode is the backward's backward.
        order = len(self.derivatives) + self.derivatives[1:].count("jvp")
        lacking = lacking_derivatives(order, forward="jvp" in self.derivatives)
        refuse_scripted(self.base.name, self.base.facts.fused_kernels, lacking)
        return lacking

    @cached_property
    def derivatives(self) -> tuple[Transform, ...]:
        """The derivatives among its levels, the outermost first."""
        return tuple(level.transform for level in self.levels() if level.transform in ("jvp", "vjp"))

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        """`execute`, for one of many runs."""
        self.settled(tensors)  # a proof is not to be recorded
        return self.run_repeatedly(self.execute, tensors)

    def run_repeatedly(self, work: Callable[..., Tensors], tensors: Tensors) -> Tensors:
        """What `work` returns on `tensors`, recorded if that is still to be done."""
        repeated = self.repeated_on(tensors[0].device) if tensors else None
        return work(*tensors) if repeated is None else repeated.run(work, tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        """Write into `results` what earlier runs give on these operands; False where they cannot tell."""
        repeated = self.repeated_on(results[0].device) if results else None
        if repeated is None or repeated.replays is None:
            return False
        repeated.replays[0]([], *operands, *results)
        return True

    def repeated_on(self, device: torch.device) -> Repeated | None:
        """Recordings of the call on a device, if it may be recorded."""
        if device not in self._repeated and self.is_repeatable:
            self._repeated.setdefault(device, Repeated())
        return self._repeated.get(device)

    @cached_property
    def is_repeatable(self) -> bool:
        """Whether it may be recorded."""
        large = LARGE_ON_GPU if self.base.facts.device.type == "cuda" else LARGE
        return self.operations <= large and self.recordable

    @property
    def recordable(self) -> bool:
        """Whether its ops do not depend on values, so far as is known."""
        raise AssertionError("abstract")

    def why_unrepeated(self) -> str | None:
        """Why later runs run Python again, where the user wants that they do not; None if they do not."""
        if not self.base.options.replay:
            return None
        if not self.recordable:
            return self.base.why_unrecordable
        if not self.is_repeatable:
            return "it is too large to be recorded (and Python weighs little)"
        return next((repeated.refusal for repeated in self._repeated.values() if repeated.refusal), None)

    def forget(self, results: Tensors) -> None:
        """Give up what a run kept for later calls, which holds operands: the next ones keep nothing."""

    def prepare(self) -> None:
        """Decide how to run, before the first run."""
        for level in self.levels():
            level.explore()
        self._lacking_derivatives  # noqa: B018 (raises where torch has none)
        self.choice.prepare(self)

    def explore(self) -> None:
        """Find out by trial runs what running this level needs to know; they cannot nest."""

    def derive(self, kind: Callable[..., Derived], *statics: Any) -> Derived:
        """`kind(self, *statics)`, one object per set of statics, so that JAX's caches hit."""
        key = (kind, *statics)
        if key not in self._derived:
            self._derived[key] = kind(self, *statics)
        return self._derived[key]

    def family(self) -> "Iterator[TorchCall]":
        """The call and all that are derived from it, and from these."""
        yield self
        for derived in list(self._derived.values()):
            if isinstance(derived, TorchCall):
                yield from derived.family()

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


class Level(TorchCall):
    """A call built on another: a derivative of it, a batch, a half."""

    inner: TorchCall
    """The call it is built on."""

    def levels(self) -> list[TorchCall]:
        return [self, *self.inner.levels()]


def execute(call: TorchCall, *tensors: torch.Tensor, repeats: bool) -> Tensors:
    """Run a call outermost, on the thread of the compiled program; `repeats`: of one that runs many times."""
    run, kernels = call.repeat if repeats else call.execute, call.base.facts.fused_kernels
    lends = scope.opened() if call.base.reenters and call is not call.base else _NO_SCOPE
    with ambient.neutral(), torch.no_grad(), lends:
        if not kernels:
            return run(*tensors)
        try:
            with chosen(kernels, inference=call is call.base, plain=call.plain_kernels):
                return run(*tensors)
        except RuntimeError as exc:
            if NO_EVALUATION_BACKWARD not in str(exc) or "recurrent" in call.plain_kernels:
                raise
            call.base.lacking = frozenset({"recurrent"})
        with chosen(kernels, inference=False, plain=call.plain_kernels):
            return run(*tensors)


_NO_SCOPE = contextlib.nullcontext()


def take(items: Sequence[Any], indices: Sequence[int]) -> tuple[Any, ...]:
    """The items at `indices`."""
    return tuple(items[i] for i in indices)


def _ends(tensor: torch.Tensor, axes: dict[int, int]) -> torch.Tensor:
    """The first and the last slice along each axis."""
    for axis in axes.values():
        if tensor.shape[axis] > 2:
            ends = torch.tensor([0, tensor.shape[axis] - 1], device=tensor.device)
            tensor = tensor.index_select(axis, ends)
    return tensor
