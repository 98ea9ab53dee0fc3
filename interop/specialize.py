"""A torch callable at one signature: a `Base` call over flat tensors, and how results become the output."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import torch

from . import ambient, dtypes
from .call import Aval, Base, Tensors
from .device_random import can_draw
from .errors import TorchCallError
from .static import static_key
from .trace import Flat, Trace
from .trees import flatten_registering, leaf_names


class Specialized:
    """What a `TorchFunction` keeps for each signature.

    **Arguments:**

    - `function`: the callable over flat tensors; with `found.random` the last one is the key.
    - `operand_names`, `in_avals`: the operands.
    - `wanted`: the torch dtype each operand arrives in.
    - `found`: what tracing found.
    - `device`: where it is likely to run.
    - `options`: those of `Base`.
    """

    def __init__(
        self,
        function: Flat,
        operand_names: Sequence[str],
        in_avals: Sequence[Aval],
        wanted: Sequence[torch.dtype],
        found: Trace,
        *,
        name: str,
        device: torch.device,
        **options: Any,
    ):
        self._name, self._function, self._found = name, function, found
        self._autocast = ambient.autocast_here()
        given = [dtypes.to_torch_dtype(aval.dtype) for aval in in_avals]
        self._conversions = [
            (i, new, i in found.mutated)
            for i, (old, new) in enumerate(zip(given, wanted, strict=True))
            if old != new or i in found.mutated
        ]
        self._is_tensor = jax.tree_util.treedef_is_leaf(found.treedef) and bool(found.out_avals)
        self._n_outs, self.state, self.random = len(found.out_avals), found.state, found.random
        out_avals = (*found.out_avals, *(in_avals[i] for i in found.state))
        self._out_dtypes = [dtypes.to_torch_dtype(aval.dtype) for aval in out_avals]
        self.call = Base(
            self._run,
            name=name,
            operand_names=operand_names,
            in_avals=in_avals,
            out_avals=out_avals,
            state=tuple(zip(found.state, range(self._n_outs, len(out_avals)), strict=True)),
            operations=found.operations,
            device=device,
            fakeable=found.fakeable,
            pure=found.fakeable and not found.checkpoints and (not found.random or can_draw(device)),
            captures=found.captures,
            grad_mode=found.grad_mode,
            fused_kernels=found.fused_kernels,
            **options,
        )

    def rebuild(self, results: Sequence[Any]) -> tuple[Any, dict[int, Any]]:
        """The callable's output, with arrays in the place of tensors, and the new values of state operands."""
        feed = iter(results)
        leaves = [next(feed) if isinstance(leaf, Aval) else leaf for leaf in self._found.leaves]
        return jax.tree.unflatten(self._found.treedef, leaves), dict(zip(self.state, feed, strict=True))

    def _run(self, *tensors: torch.Tensor) -> Tensors:
        """The callable over flat tensors of the JAX dtypes."""
        if self._conversions:
            converted = list(tensors)
            for i, dtype, written in self._conversions:
                converted[i] = _convert(tensors[i], dtype, copy=written)
            tensors = tuple(converted)
        with ambient.autocast(self._autocast) if self._autocast else _NO_CHANGE:
            output, state = self._function(*tensors)
        if self._is_tensor and type(output) is torch.Tensor:
            leaves, treedef = [output], self._found.treedef
        else:
            leaves, treedef = flatten_registering(output, every_record=True)
        if treedef != self._found.treedef:
            raise TorchCallError(
                f"{self._name} returned {treedef} at run time, but {self._found.treedef} when it was traced (or "
                "declared by `out_shape`). The structure of the output must not depend on values."
            )
        if not self._found.fakeable:
            self._check_leaves(output, leaves)
        outs = [*(y for y in leaves if isinstance(y, torch.Tensor)), *state]
        return tuple(y if y.dtype == d else y.to(d) for y, d in zip(outs, self._out_dtypes, strict=True))

    def _check_leaves(self, output: Any, leaves: Sequence[Any]) -> None:
        """A callable that inspects values may return something else each time."""
        for path, leaf, expected in zip(leaf_names(output), leaves, self._found.leaves, strict=True):
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
