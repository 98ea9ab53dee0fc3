"""`TorchCall`: a torch callable over flat tensors that knows its derivatives and batched forms.

Four kinds, closed under differentiation and batching:

- `Base(f)`: a user's torch callable;
- `Jvp(f, active, outs)`: `(x, t) -> J t`, linear in `t`;
- `Vjp(f, active, outs)`: `(x, ct) -> J^T ct`, linear in `ct`; each is the other's transpose;
- `Vmap(f, in_dims, out_dims)`: `f` over a batch axis. An operand that is not batched has the
  dim None; an *output* whose dim is None is summed over the batch. So the transpose of a
  batched linear call is the batched transpose, with the dims of operands and outputs exchanged.

Cotangents follow JAX's convention: for complex values they are the conjugate of torch's gradients.

How a call is carried out depends on what torch supports, decided once, when the call is compiled, by
trial runs on fake tensors (`trial.py`): `torch.func` transforms where they have the rules, otherwise
`torch.autograd` and loops, which always work.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import torch

from . import batching
from .dtypes import is_inexact
from .kernels import NONE, differentiable_path, plain_kernels
from .trial import trial_run

Aval = jax.ShapeDtypeStruct
Tensors = tuple[torch.Tensor, ...]
VmapMethod = Literal["auto", "vmap", "batched", "loop"]
Dims = tuple[int | None, ...]


class TorchCall:
    """A pure function of flat tensors at fixed shapes and dtypes; compared by identity."""

    name: str
    in_avals: tuple[Aval, ...]
    out_avals: tuple[Aval, ...]
    forward_mode: bool
    linear_operands: frozenset[int] = frozenset()
    """Operands the call is (jointly) linear in, given the others."""
    differentiated: bool = False
    plain_kernels: bool = False
    """Whether running the call may ask torch for derivatives that fused kernels lack."""

    def __init__(self) -> None:
        self._derived: dict[Any, TorchCall] = {}

    def run(self, *tensors: torch.Tensor) -> Tensors:
        """Compute, in a way that composes with an enclosing transform."""
        raise AssertionError("abstract")

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        """Compute, outermost: called by the compiled program under `torch.no_grad()`."""
        return self.run(*tensors)

    def prepare(self) -> None:
        """Decide how to run, before the first run: trial runs cannot nest."""

    @property
    def composable(self) -> bool:
        """Whether `run` may stand inside a `torch.func` transform."""
        raise AssertionError("abstract")

    @property
    def base(self) -> "Base":
        """The user's callable underneath."""
        raise AssertionError("abstract")

    def derive(self, kind: "type[TorchCall]", *statics: Any) -> "TorchCall":
        """`kind(self, *statics)`, one object per set of statics, so that JAX's caches hit."""
        key = (kind, *statics)
        if key not in self._derived:
            self._derived[key] = kind(self, *statics)
        return self._derived[key]

    @property
    def inexact_outs(self) -> tuple[int, ...]:
        """Outputs that carry tangents."""
        return tuple(i for i, aval in enumerate(self.out_avals) if is_inexact(aval.dtype))

    def linearize(self, active: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...], tuple[int, ...]]":
        """The call's tangent map with respect to the `active` operands.

        Returns a call, the operands of `self` it needs first, and the outputs of `self` whose
        tangents it gives when the tangents of `active` follow them.
        """
        residuals = tuple(range(len(self.in_avals)))
        return self.derive(Jvp, active, self.inexact_outs), residuals, self.inexact_outs

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...]]":
        """The transpose with respect to `linear` operands, for cotangents of `outs`.

        Returns a call and the operands of `self` it needs first; cotangents follow them.
        """
        raise TypeError(
            f"{self.name} cannot be transposed: torchleaf does not know it to be linear. "
            "Use jax.vjp, which gives the transpose of its derivative."
        )

    def select(self, used: tuple[int, ...]) -> "tuple[TorchCall, tuple[int, ...]] | None":
        """A call that computes the `used` outputs only, and the operands it needs; None if there is no cheaper one."""
        return None

    def vmap(self, in_dims: Dims, size: int, method: VmapMethod) -> "TorchCall":
        """The call over a batch of `size`, its outputs batched along axis 0."""
        return self.derive(Vmap, in_dims, (0,) * len(self.out_avals), size, method)

    def __repr__(self) -> str:
        return self.name


class Base(TorchCall):
    """A torch callable over flat tensors.

    **Arguments:**

    - `function`: takes one tensor per aval and returns one tensor per output aval.
    - `fakeable`: whether `function` can run on fake tensors (False if it inspects values).
    - `fused_kernels`: those it uses that are replaced under higher derivatives (`kernels.py`).
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        *,
        name: str,
        in_avals: Sequence[Aval],
        out_avals: Sequence[Aval],
        fakeable: bool,
        fused_kernels: frozenset[str],
        forward_mode: bool,
        vmap_method: VmapMethod,
    ):
        super().__init__()
        self.function, self.name = function, name
        self.fakeable, self.fused_kernels = fakeable, fused_kernels
        self.in_avals, self.out_avals = tuple(in_avals), tuple(out_avals)
        self.forward_mode, self.vmap_method = forward_mode, vmap_method

        self.warned = False  # about falling back to a loop

    def run(self, *tensors: torch.Tensor) -> Tensors:
        return self.function(*tensors)

    @property
    def composable(self) -> bool:
        return self.fakeable

    @property
    def base(self) -> "Base":
        return self


class _Derivative(TorchCall):
    """What `Jvp` and `Vjp` share: primal operands of `inner` first, then the linear ones."""

    def __init__(self, inner: TorchCall, active: tuple[int, ...], outs: tuple[int, ...]):
        super().__init__()
        self.inner, self.active, self.outs = inner, active, outs
        self.forward_mode, self.differentiated = inner.forward_mode, True
        self.plain_kernels = inner.differentiated or isinstance(self, Jvp)
        self.n_primals = len(inner.in_avals)
        active_avals = tuple(inner.in_avals[i] for i in active)
        chosen_avals = tuple(inner.out_avals[o] for o in outs)
        linear_avals, self.out_avals = self._direction(active_avals, chosen_avals)
        self.in_avals = inner.in_avals + linear_avals
        self.linear_operands = frozenset(range(self.n_primals, len(self.in_avals)))

    def prepare(self) -> None:
        self.inner.prepare()

    @property
    def base(self) -> Base:
        return self.inner.base

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        raise AssertionError("abstract")

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        """The same map from fewer linear operands to fewer outputs (numbered within each)."""
        raise AssertionError("abstract")

    def linearize(self, active: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...], tuple[int, ...]]:
        if not self.linear_operands.issuperset(active):
            return super().linearize(active)
        every = tuple(range(len(self.out_avals)))
        restricted = self._restrict(tuple(i - self.n_primals for i in active), every)
        return restricted, tuple(range(self.n_primals)), every

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        every = range(len(self.in_avals))
        return self._restrict(tuple(range(len(every) - self.n_primals)), used), tuple(every)

    def _function_of_active(self, primals: Tensors) -> Callable[..., Tensors]:
        """The chosen outputs as a function of the active operands alone."""

        def function(*active: torch.Tensor) -> Tensors:
            operands = list(primals)
            for i, x in zip(self.active, active, strict=True):
                operands[i] = x
            results = self.inner.run(*operands)
            return tuple(results[o] for o in self.outs)

        return function

    def _actives(self, primals: Tensors) -> Tensors:
        return tuple(primals[i] for i in self.active)

    def _run_autograd(self, primals: Tensors, linear: Tensors) -> Tensors:
        """Reverse mode through `torch.autograd`, which needs no `torch.func` support."""
        raise AssertionError("abstract")


class Jvp(_Derivative):
    """`(x, t) -> J(x) t`: tangents of the outputs `outs` from tangents of the operands `active`."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"jvp({self.inner.name})"

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        return active, outs

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Jvp, _take(self.active, operands), _take(self.outs, outs))

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        active = _take(self.active, [i - self.n_primals for i in linear])
        return self.inner.derive(Vjp, active, _take(self.outs, outs)), tuple(range(self.n_primals))

    def run(self, *tensors: torch.Tensor) -> Tensors:
        primals, tangents = tensors[: self.n_primals], tensors[self.n_primals :]
        return getattr(self, self._strategy)(primals, tangents)

    def prepare(self) -> None:
        super().prepare()
        self.composable  # noqa: B018 (decides the strategy)

    @property
    def composable(self) -> bool:
        return self._strategy != "_run_autograd"

    @cached_property
    def _strategy(self) -> str:
        """Forward mode where torch has every formula; else reverse mode twice; else plain autograd."""
        if self.inner.composable:
            for strategy in ("_run_forward", "_run_reverse_twice"):
                if trial_run(self._trial(strategy), self.in_avals) is None:
                    return strategy
        return "_run_autograd"

    def _trial(self, strategy: str) -> Callable[..., Tensors]:
        n = self.n_primals
        return lambda *tensors: getattr(self, strategy)(tensors[:n], tensors[n:])

    def _run_forward(self, primals: Tensors, tangents: Tensors) -> Tensors:
        function = self._function_of_active(primals)
        return torch.func.jvp(function, self._actives(primals), tangents)[1]

    def _run_reverse_twice(self, primals: Tensors, tangents: Tensors) -> Tensors:
        # ct -> J^T ct is linear, so its own vjp, at any ct, is t -> J t.
        function = self._function_of_active(primals)
        outs, pullback = torch.func.vjp(function, *self._actives(primals))
        _, pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(y) for y in outs))
        return pushforward(tangents)[0]

    def _run_autograd(self, primals: Tensors, linear: Tensors) -> Tensors:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            outs, xs = _forward_with_graph(self._function_of_active(primals), self._actives(primals))
            cotangents = tuple(torch.zeros_like(y).requires_grad_() for y in outs)
            grads = _grad(outs, xs, cotangents, create_graph=True)
            return _grad(grads, cotangents, linear, create_graph=create_graph)


class Vjp(_Derivative):
    """`(x, ct) -> J(x)^T ct`: cotangents of the operands `active` from cotangents of the outputs `outs`."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"vjp({self.inner.name})"

    @staticmethod
    def _direction(active: tuple[Aval, ...], outs: tuple[Aval, ...]) -> tuple[tuple[Aval, ...], tuple[Aval, ...]]:
        return outs, active

    def _restrict(self, operands: tuple[int, ...], outs: tuple[int, ...]) -> TorchCall:
        return self.inner.derive(Vjp, _take(self.active, outs), _take(self.outs, operands))

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        chosen = _take(self.outs, [i - self.n_primals for i in linear])
        return self.inner.derive(Jvp, _take(self.active, outs), chosen), tuple(range(self.n_primals))

    def run(self, *tensors: torch.Tensor) -> Tensors:
        primals, cotangents = tensors[: self.n_primals], tensors[self.n_primals :]
        run = self._run_functional if self.composable else self._run_autograd
        return run(primals, cotangents)

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        # Outermost, torch.autograd is cheaper than torch.func and supports more.
        return self._run_autograd(tensors[: self.n_primals], tensors[self.n_primals :])

    @cached_property
    def composable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = self.n_primals
        return self.inner.composable and (
            trial_run(lambda *ts: self._run_functional(ts[:n], ts[n:]), self.in_avals) is None
        )

    def _run_functional(self, primals: Tensors, cotangents: Tensors) -> Tensors:
        _, pullback = torch.func.vjp(self._function_of_active(primals), *self._actives(primals))
        return _conj(pullback(_conj(cotangents)))

    def _run_autograd(self, primals: Tensors, linear: Tensors) -> Tensors:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            outs, xs = _forward_with_graph(self._function_of_active(primals), self._actives(primals))
            return _conj(_grad(outs, xs, _conj(linear), create_graph=create_graph))


class Vmap(TorchCall):
    """`inner` over a batch axis: `in_dims` and `out_dims` per operand and output.

    Dim None means *shared by the batch* for an operand and *summed over the batch* for an output.
    """

    def __init__(self, inner: TorchCall, in_dims: Dims, out_dims: Dims, size: int, method: VmapMethod):
        super().__init__()
        self.inner, self.in_dims, self.out_dims = inner, in_dims, out_dims
        self.size, self.method = size, method
        self.forward_mode, self.linear_operands = inner.forward_mode, inner.linear_operands
        self.differentiated = self.plain_kernels = inner.differentiated
        self.in_avals = tuple(_batched_aval(a, d, size) for a, d in zip(inner.in_avals, in_dims, strict=True))
        self.out_avals = tuple(_batched_aval(a, d, size) for a, d in zip(inner.out_avals, out_dims, strict=True))

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"vmap({self.inner.name})"

    def linearize(self, active: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...], tuple[int, ...]]:
        if not self.linear_operands.issuperset(active):
            return super().linearize(active)
        restricted, residuals, outs = self.inner.linearize(active)
        in_dims = _take(self.in_dims, residuals + active)
        return self._like(restricted, in_dims, _take(self.out_dims, outs)), residuals, outs

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        transposed, residuals = self.inner.transpose(linear, outs)
        in_dims = _take(self.in_dims, residuals) + _take(self.out_dims, outs)
        return self._like(transposed, in_dims, _take(self.in_dims, linear)), residuals

    def select(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        selected = self.inner.select(used)
        if selected is None:
            return None
        call, operands = selected
        return self._like(call, _take(self.in_dims, operands), _take(self.out_dims, used)), operands

    def _like(self, inner: TorchCall, in_dims: Dims, out_dims: Dims) -> TorchCall:
        return inner.derive(Vmap, in_dims, out_dims, self.size, self.method)

    def run(self, *tensors: torch.Tensor) -> Tensors:
        batched = self._strategy(*tensors)
        return tuple((y.sum(0) if d is None else y.movedim(0, d)) for y, d in zip(batched, self.out_dims, strict=True))

    def prepare(self) -> None:
        self.inner.prepare()
        self._strategy  # noqa: B018 (decides it)

    @property
    def composable(self) -> bool:
        return self.inner.composable

    @property
    def base(self) -> Base:
        return self.inner.base

    @cached_property
    def _strategy(self) -> Callable[..., Tensors]:
        return batching.strategy(self)


def _take(items: Sequence[Any], indices: Sequence[int]) -> tuple[Any, ...]:
    return tuple(items[i] for i in indices)


def _batched_aval(aval: Aval, dim: int | None, size: int) -> Aval:
    if dim is None:
        return aval
    return Aval((*aval.shape[:dim], size, *aval.shape[dim:]), aval.dtype)


def _conj(tensors: Tensors) -> Tensors:
    return tuple(t.conj() if t.is_complex() else t for t in tensors)


def _forward_with_graph(function: Callable[..., Tensors], xs: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs of `function`, and the graph's leaves: aliases of `xs`, so that the gradient with
    respect to one alias is not mixed up with other uses of the same tensor."""
    leaves = tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in xs)
    return function(*leaves), leaves


def _grad(outs: Tensors, xs: Tensors, cotangents: Tensors, *, create_graph: bool) -> Tensors:
    """`torch.autograd.grad`, giving zeros where `outs` do not depend on `xs`."""
    pairs = [(y, ct) for y, ct in zip(outs, cotangents, strict=True) if y.requires_grad]
    if not pairs or not xs:
        return tuple(torch.zeros_like(x) for x in xs)
    reached, reaching = zip(*pairs, strict=True)
    grads = torch.autograd.grad(reached, xs, reaching, create_graph=create_graph, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True))


def execute(call: TorchCall, *tensors: torch.Tensor) -> Tensors:
    """Run a call outermost, on the thread of the compiled program."""
    kernels = call.base.fused_kernels
    with torch.no_grad(), differentiable_path(kernels), plain_kernels(kernels if call.plain_kernels else NONE):
        return call.execute(*tensors)
