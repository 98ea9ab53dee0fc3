"""A torch callable at one signature: a `Base` call over flat tensors, and how results become the output."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import torch

from ..calls.base import Base, Facts
from ..errors import TorchCallError
from ..modes import guard
from ..modes.autocast import autocast, autocast_here
from ..modes.guard import Guard
from ..modes.kernels import HIGHER_ORDER, UNRECORDED, quiet_compiler
from ..types import Aval, CallOptions, Tensors
from ..values import dtypes
from ..values.memory import storage_of
from ..values.names import leaf_names
from ..values.narrow import narrowed
from ..values.statics import static_key
from ..values.trees import flatten_registering
from .trace import Trace
from .traceable import Flat, Traceable


class Specialized:
    """What is kept for each signature.

    **Arguments:**

    - `function`: the callable over flat tensors; with `found.random` the last one is the key.
    - `traced`: what was traced: its name, its operands, where they lie.
    - `found`: what tracing found.
    - `options`: the user's.
    - `is_loose`: whether torch's autograd has to differentiate each call by itself.
    - `refuse_write`: called where operands that are state, but not in `found.state`, would change.
    """

    def __init__(
        self,
        function: Flat,
        traced: Traceable,
        found: Trace,
        options: CallOptions,
        *,
        is_loose: bool,
        refuse_write: Callable[[Collection[int]], NoReturn],
    ):
        self._name, self._function, self.found = traced.name, function, found
        self._autocast = autocast_here()
        self._x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        self._wanted, self._refuse_write = [x.dtype for x in traced.operands], refuse_write
        self._key_remedy = None if found.random else traced.key_remedy
        self._fixed = tuple(i for i in traced.state_operands if i not in found.state)
        self._copies = found.watched and (found.leaves_torch or not found.fused_kernels.isdisjoint(UNRECORDED))
        self._mutated = set(range(len(traced.operands))) if self._copies else set(found.mutated)
        self._conversions = self._find_conversions([dtypes.to_torch_dtype(x.aval.dtype) for x in traced.operands])
        self._is_tensor = jax.tree_util.treedef_is_leaf(found.treedef) and bool(found.out_avals)
        n_outs = len(found.out_avals)
        out_avals = (*found.out_avals, *(traced.operands[i].aval for i in found.state))
        self._out_dtypes = [dtypes.to_torch_dtype(aval.dtype) for aval in out_avals]
        facts = Facts(
            state=tuple(zip(found.state, range(n_outs, len(out_avals)), strict=True)),
            flops=found.flops,
            device=traced.device,
            fakeable=found.fakeable and HIGHER_ORDER not in found.fused_kernels,  # torch.func.jvp of `cond` is zero
            pure=found.steady,
            reads=found.reads if found.steady and not found.fakeable else None,
            captures=found.captures,
            precision=found.precision,
            grad_mode=found.grad_mode,
            differentiates=found.differentiates,
            checkpoints=found.checkpoints,
            fused_kernels=found.fused_kernels,
            is_loose=is_loose,
            without_autograd=found.without_autograd,
            foreign=traced.foreign,
        )
        self.call = Base(self._run, traced.name, traced.operands, out_avals, facts, options)

    def _find_conversions(self, given: Sequence[torch.dtype]) -> list[tuple[int, torch.dtype, bool]]:
        """For operands that need it: their number, their dtype, and whether they are to be copies."""
        return [
            (i, new, i in self._mutated)
            for i, (old, new) in enumerate(zip(given, self._wanted, strict=True))
            if old != new or i in self._mutated
        ]

    def _run(self, *tensors: torch.Tensor) -> Tensors:
        """The callable over flat tensors of the JAX dtypes."""
        if not self.found.watched or not guard.is_plain_run(tensors):
            return self._run_on(self._converted(tensors))
        outs = None
        while outs is None:
            outs = self._run_watched(tensors)
        return outs

    def _run_watched(self, tensors: Tensors) -> Tensors | None:
        """One run; None if it was about to write into an operand of which the next one gets a copy."""
        converted = self._converted(tensors)
        memory = {i: storage_of(x) for i, x in enumerate(converted) if x is tensors[i] or i in self._fixed}
        watch = Guard(
            {} if self._copies else {address: i for i, address in memory.items()}, self._name, self._key_remedy
        )
        outs: Tensors = ()
        try:
            with watch:
                outs = self._run_on(converted)
        except BaseException:
            if watch.operand is None:
                raise
        if watch.operand is None:
            self._check_fixed(tensors, converted, memory)
            return outs
        if watch.is_exposed:  # anything may be written there from now on
            self._copies, self._mutated = True, set(range(len(tensors)))
        elif watch.operand in self._fixed:
            self._refuse_write([watch.operand])
        self._mutated.add(watch.operand)
        self._conversions = self._find_conversions([x.dtype for x in tensors])
        return None

    def _check_fixed(self, tensors: Tensors, converted: Tensors, memory: Mapping[int, int]) -> None:
        """Refuse changes of state past torch's dispatcher, and those by `x.data = ...`, which writes into no memory."""
        changed = [i for i in self._fixed if storage_of(converted[i]) != memory[i]]
        if self._copies:
            changed = [i for i in self._fixed if guard.changed(tensors[i].to(self._wanted[i]), converted[i])]
        if changed:
            self._refuse_write(changed)

    def _converted(self, tensors: Tensors) -> Tensors:
        """The operands in the dtypes they are wanted in, copied where the callable writes into them."""
        if not self._conversions:
            return tensors
        converted = list(tensors)
        for i, dtype, written in self._conversions:
            converted[i] = _convert(tensors[i], dtype, copy=written)
        return tuple(converted)

    def _run_on(self, tensors: Tensors) -> Tensors:
        compiles = HIGHER_ORDER in self.found.fused_kernels
        entered = autocast(self._autocast) if self._autocast else _NO_CHANGE
        with entered, quiet_compiler() if compiles else _NO_CHANGE:
            output, state = self._function(*tensors)
        if self._is_tensor and type(output) is torch.Tensor:
            leaves, treedef = [output], self.found.treedef
        else:
            leaves, treedef = flatten_registering(output, every_record=True)
        if treedef != self.found.treedef:
            raise TorchCallError(
                f"{self._name} returned {treedef} at run time, but {self.found.treedef} when it was traced (or "
                "declared by `out_shape`). The structure of the output must not depend on values."
            )
        if self.found.watched:
            with jax.enable_x64(self._x64):  # of the thread that traced it; this one is XLA's
                self._check_leaves(output, leaves)
        outs = [*(y for y in leaves if isinstance(y, torch.Tensor)), *state]
        return tuple(
            y if y.dtype == d else narrowed(y, d, self._name) for y, d in zip(outs, self._out_dtypes, strict=True)
        )

    def _check_leaves(self, output: Any, leaves: Sequence[Any]) -> None:
        """A callable that inspects values may return something else each time."""
        for path, leaf, expected in zip(leaf_names(output), leaves, self.found.leaves, strict=True):
            where = f"{self._name} returned at output{path}"
            if isinstance(expected, Aval):
                if not isinstance(leaf, torch.Tensor):
                    raise TorchCallError(f"{where} a {type(leaf).__name__} ({leaf!r}); expected a tensor: {expected}.")
                if dtypes.canonical(leaf.dtype) != expected.dtype:
                    raise TorchCallError(
                        f"{where} a tensor of dtype {leaf.dtype}, but {expected.dtype} was traced or declared by "
                        "`out_shape`. Correct `out_shape`, or cast the tensor."
                    )
            elif isinstance(leaf, torch.Tensor) or static_key(leaf) != static_key(expected):
                raise TorchCallError(
                    f"{where} {leaf!r}, but {expected!r} when it was traced: an output that is not a tensor must not "
                    "depend on values. Return it as a tensor."
                )


_NO_CHANGE = contextlib.nullcontext()


def _convert(tensor: torch.Tensor, dtype: torch.dtype, *, copy: bool) -> torch.Tensor:
    if tensor.dtype != dtype:
        return tensor.to(dtype)
    return tensor.clone() if copy else tensor
