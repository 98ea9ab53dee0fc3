"""`Vmap`: a torch call over a batch axis, by `torch.func.vmap`, natively batched, or as a loop in one torch call.

An operand that is not batched has the dim None; an *output* whose dim is None is summed over the batch, or else is
state that the examples share. So the transpose of a batched linear call is the batched transpose, with the dims of
operands and outputs exchanged.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from functools import cached_property

import torch

from ..errors import StateError, TorchCallError
from ..modes.fake_run import fake_run
from ..types import Aval, Tensors, VmapMethod
from ..values import dtypes
from . import scope
from .call import Computation, Level, Linearized, TorchCall, take
from .execution import Execution, Planned
from .plan import Plan

Dims = tuple[int | None, ...]


def vmap(call: Computation, in_dims: Dims, size: int) -> "Vmap":
    """`call` over a batch of `size`, its outputs batched along axis 0; state that all examples share is not.

    Raises `StateError` where examples would change shared state each in its own way.
    """
    shared = {out for operand, out in call.state if in_dims[operand] is None}
    if shared and call.base.options.vmap_method != "batched":
        raise StateError(
            f"vmap of {call.name}: the examples share the state {_state_names(call)}, which each would change in its "
            "own way; torch's statistics are those of the whole batch. Call the module on the whole batch outside vmap "
            "(vmap only the JAX parts of the model), or, if it takes single examples as well, pass vmap_method="
            "'batched' to have vmap do so, or give each example its own parameters and state (torchleaf.stack)."
        )
    out_dims = tuple(None if i in shared else 0 for i in range(len(call.out_avals)))
    return call.derive(Vmap, in_dims, out_dims, size, call.base.options.vmap_method)


class Vmap(Level):
    """`inner` over a batch axis, at `in_dims` of its operands and `out_dims` of its outputs."""

    def __init__(self, inner: Computation, in_dims: Dims, out_dims: Dims, size: int, method: VmapMethod):
        super().__init__()
        self.inner, self.in_dims, self.out_dims, self.name = inner, in_dims, out_dims, f"vmap({inner.name})"
        self.size, self.method = size, method
        self.base, self.depth, self.state = inner.base, inner.depth + 1, inner.state
        self.linear_operands, self.directions = inner.linear_operands, inner.directions
        self._shared = frozenset(out for _, out in inner.state if out_dims[out] is None)
        self.differentiated, self.flops = inner.differentiated, size * inner.flops
        self.in_avals = tuple(_batched_aval(a, d, size) for a, d in zip(inner.in_avals, in_dims, strict=True))
        self.out_avals = tuple(_batched_aval(a, d, size) for a, d in zip(inner.out_avals, out_dims, strict=True))
        self.transform = "vmap" if self._way is _by_examples and method != "loop" else None
        own = self.depth if self._way is _by_examples else None
        self.in_axes = tuple(_batched_axes(a, d, own) for a, d in zip(inner.in_axes, in_dims, strict=True))
        self.out_axes = tuple(_batched_axes(a, d, own) for a, d in zip(inner.out_axes, out_dims, strict=True))

    def _execution(self) -> Execution:
        return Planned(self)

    def explore(self) -> None:
        if self._way is _natively:
            self.derive(_find_batch_axes)
        elif self._way is _merged:
            self._merged_call.explore()

    def fewer_examples(self) -> Computation:
        size = min(self.size, 2) if self._way is _by_examples else self.size
        return self.inner.fewer_examples().derive(Vmap, self.in_dims, self.out_dims, size, self.method)

    def linearize(self, active: tuple[int, ...]) -> Linearized | None:
        linearized = self.inner.linearize(active)
        if linearized is None:
            return None
        restricted, residuals, outs = linearized
        return (
            self._like(restricted, take(self.in_dims, residuals + active), take(self.out_dims, outs)),
            residuals,
            outs,
        )

    def transpose(self, linear: tuple[int, ...], outs: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]]:
        transposed, residuals = self.inner.transpose(linear, outs)
        in_dims = take(self.in_dims, residuals) + take(self.out_dims, outs)
        return self._like(transposed, in_dims, take(self.in_dims, linear)), residuals

    def dce(self, used: tuple[int, ...]) -> tuple[TorchCall, tuple[int, ...]] | None:
        selected = self.inner.dce(used)
        if selected is None:
            return None
        call, operands = selected
        return self._like(call, take(self.in_dims, operands), take(self.out_dims, used)), operands

    def _like(self, inner: TorchCall, in_dims: Dims, out_dims: Dims) -> TorchCall:
        return inner.derive(Vmap, in_dims, out_dims, self.size, self.method)

    @property
    def recordable(self) -> bool:
        return self.inner.recordable

    def compute(self, plan: Plan, *tensors: torch.Tensor) -> Tensors:
        batched = self._way(self, plan, *_batch_first(self, tensors))
        return tuple(
            y if i in self._shared else y.sum(0) if d is None else y.movedim(0, d)
            for i, (y, d) in enumerate(zip(batched, self.out_dims, strict=True))
        )

    @cached_property
    def _way(self) -> "Callable[..., Tensors]":
        """How to run; every way returns outputs batched along axis 0."""
        if self.size == 0:
            return _empty
        if self.method == "batched" and self.inner is self.base:
            return _natively
        return _merged if self._continues_batch else _by_examples

    @property
    def _continues_batch(self) -> bool:
        """Whether this batch and the one inside it are one batch for a natively batched callable."""
        inner = self.inner
        return (
            self.method == "batched"
            and isinstance(inner, Vmap)
            and inner._way in (_natively, _merged)
            and all((d is None) == (e is None) for d, e in zip(self.in_dims, inner.in_dims, strict=True))
        )

    @property
    def _merged_call(self) -> "Vmap":
        inner = self.inner
        assert isinstance(inner, Vmap)
        in_dims = tuple(None if d is None else 0 for d in self.in_dims)
        return inner.inner.derive(Vmap, in_dims, inner.out_dims, self.size * inner.size, self.method)

    def tell_of_loop(self, because: str) -> None:
        if self.method == "vmap":
            raise TorchCallError(
                f"vmap of {self.inner.name}: torch.func.vmap cannot batch it ({because}). Use vmap_method='auto' or "
                "'loop' to run it example by example, or 'batched' if it takes a leading batch axis itself."
            )
        if not self.base.warned:
            self.base.warned = True
            warnings.warn(
                f"vmap of {self.inner.name}: torch.func.vmap cannot batch it, so it runs as a loop over {self.size} "
                f"examples inside one torch call ({because}). Pass vmap_method='batched' if it takes a leading batch "
                "axis itself, or vmap_method='loop' to silence this.",
                stacklevel=3,
            )


def _find_batch_axes(call: Vmap) -> tuple[int, ...]:
    """Where a natively batched callable leaves the batch: hidden states of recurrent layers have it second.

    The axis of each output that grows with it; 0 where fake tensors cannot tell.
    """
    avals, shapes = call.inner.out_avals, []
    size = 1 + max((n for aval in avals for n in aval.shape), default=0)  # a size that no other axis has
    in_avals = [
        _batched_aval(a, None if d is None else 0, size) for a, d in zip(call.inner.in_avals, call.in_dims, strict=True)
    ]

    def note_shapes(*tensors: torch.Tensor) -> None:
        shapes.extend(tuple(y.shape) for y in call.base.run(*tensors))

    if fake_run(note_shapes, in_avals, call.base.facts.device) is not None:
        return (0,) * len(avals)
    axes = tuple(shape.index(size) if size in shape else 0 for shape in shapes)
    for i, (shape, axis) in enumerate(zip(shapes, axes, strict=True)):
        _check_batched(call, i, shape, axis, size)
    return axes


def _state_names(call: TorchCall) -> str:
    return ", ".join(call.base.operand_name(operand).removeprefix("argument ") for operand, _ in call.state)


def _check_batched(call: Vmap, output: int, shape: tuple[int, ...], axis: int, size: int) -> None:
    aval = call.inner.out_avals[output]
    expected = aval.shape if output in call._shared else (*aval.shape[:axis], size, *aval.shape[axis:])
    if shape != expected:
        raise TorchCallError(
            f"vmap of {call.inner.name} with vmap_method='batched': output {output} has shape {shape} for a batch of "
            f"{size}, expected {expected}. The torch callable does not treat a leading axis as a batch of independent "
            "examples; use vmap_method='auto'."
        )


def _batch_first(call: Vmap, tensors: Tensors) -> Tensors:
    """Batch axes leading, in contiguous memory: JAX arrays have no strides, and `Tensor.view` asks for them."""
    return tuple(x.movedim(d, 0).contiguous() if d else x for x, d in zip(tensors, call.in_dims, strict=True))


# Every way gets batch axes leading.


def _by_examples(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    """All examples at once by `torch.func.vmap`, or one after another."""
    by_vmap = call.depth <= plan.core and plan.batched and call.transform == "vmap"
    return (_vectorised if by_vmap else _loop)(call, plan, *tensors)


def _vectorised(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    inner = functools.partial(call.inner.compute, plan)
    in_dims = tuple(None if d is None else 0 for d in call.in_dims)
    return torch.func.vmap(inner, in_dims=in_dims, out_dims=0, randomness="different")(*tensors)


def _loop(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    def example(i: int) -> Tensors:
        # Each in memory of its own, as it is alone: some code addresses memory (`as_strided`).
        operands = (x if d is None else x[i].clone() for x, d in zip(tensors, call.in_dims, strict=True))
        is_whole = not torch.is_grad_enabled()  # else a backward pass through all examples is to come
        with scope.opened() if is_whole and scope.current() else _NO_SCOPE:
            return call.inner.compute(plan, *operands)

    return tuple(torch.stack(ys) for ys in zip(*map(example, range(call.size)), strict=True))


_NO_SCOPE = contextlib.nullcontext()


def _natively(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    """One call of a natively batched function, shared operands as they are."""
    outs, axes = call.inner.compute(plan, *tensors), call.derive(_find_batch_axes)
    for i, (y, axis) in enumerate(zip(outs, axes, strict=True)):
        _check_batched(call, i, tuple(y.shape), axis, call.size)
    return tuple(
        y if i in call._shared else y.movedim(axis, 0) for i, (y, axis) in enumerate(zip(outs, axes, strict=True))
    )


def _merged(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    """A batch of batches as one batch."""
    inner = call.inner
    assert isinstance(inner, Vmap)
    merged = [
        x if d is None or e is None else x.movedim(e + 1, 1).flatten(0, 1)
        for x, d, e in zip(tensors, call.in_dims, inner.in_dims, strict=True)
    ]
    return tuple(
        y if i in call._shared else y.unflatten(0, (call.size, inner.size))
        for i, y in enumerate(call._merged_call.compute(plan, *merged))
    )


def _empty(call: Vmap, plan: Plan, *tensors: torch.Tensor) -> Tensors:
    """A batch of none; sums over it are zeros, and shared state stays as it is."""
    device = tensors[0].device
    outs = [
        torch.empty((0, *aval.shape), dtype=dtypes.to_torch_dtype(aval.dtype), device=device)
        for aval in call.inner.out_avals
    ]
    for operand, out in call.state:
        outs[out] = tensors[operand] if out in call._shared else outs[out]
    return tuple(outs)


def _batched_aval(aval: Aval, dim: int | None, size: int) -> Aval:
    if dim is None:
        return aval
    return Aval((*aval.shape[:dim], size, *aval.shape[dim:]), aval.dtype)


def _batched_axes(axes: dict[int, int], dim: int | None, own: int | None) -> dict[int, int]:
    """The batch axes of an operand or output when there is one more at `dim`, that of the level `own`."""
    if dim is None:
        return axes
    return {level: a + (a >= dim) for level, a in axes.items()} | ({} if own is None else {own: dim})
