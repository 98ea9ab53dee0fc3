"""`TorchCall`: a torch callable over flat tensors, closed under differentiation and batching.

The kinds, each built on another call down to the user's callable:

- `Base(f)`: a user's torch callable (`base.py`);
- `Jvp(f, active, outs)`: `(x, t) -> J t`, linear in `t` (`derivative.py`);
- `Vjp(f, active, outs)`: `(x, ct) -> J^T ct`, linear in `ct`; each is the other's transpose;
- `Save(f, active)`: `f`, keeping torch's autograd graph for one of the above (`save.py`);
- `Vmap(f, in_dims, out_dims)`: `f` over a batch axis (`batching.py`);
- `PerExampleVjp(vjp, in_dims)`: a `Vjp` over a batch axis, by the one graph of the whole batch (`per_example.py`).

This is what they are. How one is carried out is its `execution` (`execution.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..types import Aval, Tensors
from ..values.dtypes import is_inexact
from .plan import Plan, Transform

if TYPE_CHECKING:
    from .base import Base
    from .execution import Execution

Linearized = tuple["TorchCall", tuple[int, ...], tuple[int, ...]]
Derived = TypeVar("Derived")
Axes = tuple[dict[int, int], ...]


class TorchCall(ABC):
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

    flops: float
    """How many floating-point operations the call takes, about."""

    def __init__(self) -> None:
        self._derived: dict[Any, Any] = {}

    @cached_property
    def execution(self) -> "Execution":
        """How the call is carried out."""
        return self._execution()

    @abstractmethod
    def _execution(self) -> "Execution":
        """What carries out a call of this kind."""

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
            f"{self.name} cannot be transposed: torchleaf does not know it to be linear. Give jax.linear_transpose, or "
            "a solver such as gmres, `jax.linearize(f, x)[1]`, which is linear in any case; or use engine='xla'."
        )

    def dce(self, used: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...]] | None":
        """A cheaper call and the operands it needs; None if there is none.

        It gives the `used` outputs, or else the first few that hold all of them.
        """
        return None

    def graphless(self) -> "tuple[Computation, tuple[int, ...]] | None":
        """For a call that keeps or uses a live autograd graph: the one that does not, and the operands it needs."""
        return None

    def __repr__(self) -> str:
        return self.name


def graphless(call: TorchCall) -> "tuple[Computation, tuple[int, ...]]":
    """`TorchCall.graphless` of a call that keeps or uses a graph."""
    found = call.graphless()
    assert found is not None
    return found


class Computation(TorchCall):
    """A call that torch computes level by level: the user's callable, and around it derivatives and batches."""

    depth: int = 0
    """How many levels it is away from the user's callable."""
    transform: Transform | None = None
    """The transform of torch.func that could carry out this level."""
    in_axes: Axes
    out_axes: Axes
    """Of each operand and of each output, the axes that are batches, by the level whose examples they number."""

    def levels(self) -> "list[Computation]":
        """The call, the one it is built on, and so forth; without the user's callable."""
        return []

    @cached_property
    def derivatives(self) -> tuple[Transform, ...]:
        """The derivatives among its levels, the outermost first."""
        return tuple(level.transform for level in self.levels() if level.transform in ("jvp", "vjp"))

    @abstractmethod
    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        """Compute by a plan."""

    @abstractmethod
    def fewer_examples(self) -> "Computation":
        """The same call with at most two examples in each batch."""

    @property
    @abstractmethod
    def recordable(self) -> bool:
        """Whether its ops do not depend on values, so far as is known."""

    def sampled(self, tensors: Tensors) -> "tuple[Computation, Tensors]":
        """The same call with at most two examples in each batch, and those of its operands, or of the first few."""
        call = self.fewer_examples()
        return call, tuple(map(_ends, tensors, self.in_axes))

    def explore(self) -> None:
        """Find out by fake runs what running this level needs to know; they cannot nest."""

    def tell_of_loop(self, because: str) -> None:
        """Of a batch: say that it runs as a loop, or refuse to."""


class Level(Computation):
    """A computation built on another: a derivative of it, or a batch."""

    inner: Computation
    """The computation it is built on."""

    def levels(self) -> list[Computation]:
        return [self, *self.inner.levels()]


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
