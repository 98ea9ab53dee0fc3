"""How a call runs over a batch: `torch.func.vmap`, natively batched, or a loop in one torch call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import dtypes
from .errors import TorchCallError, quote
from .trial import trial_run

if TYPE_CHECKING:
    from .call import Tensors, Vmap


def strategy(call: Vmap) -> Callable[..., Tensors]:
    """Choose how `call` runs; every choice returns outputs batched along axis 0."""
    if call.size == 0:
        return lambda *tensors: _empty(call, *tensors)
    method = call.method
    if method == "batched" and call.inner is call.base:
        return lambda *tensors: _batched(call, *tensors)
    if method == "loop":
        return lambda *tensors: _loop(call, *tensors)
    failure = _vmap_failure(call)
    if failure is None:
        return lambda *tensors: _vmap(call, *tensors)
    if method == "vmap":
        raise TorchCallError(
            f"vmap of {call.inner.name}: torch.func.vmap cannot batch it ({failure}). Use vmap_method='auto' or "
            "'loop' to run it example by example, or 'batched' if it takes a leading batch axis itself."
        )
    if not call.base.warned:
        call.base.warned = True
        _warn_about_loop(call, failure)
    return lambda *tensors: _loop(call, *tensors)


def _warn_about_loop(call: Vmap, failure: str) -> None:
    warnings.warn(
        f"vmap of {call.inner.name}: torch.func.vmap cannot batch it, so it runs as a loop over {call.size} "
        f"examples inside one torch call ({failure}). Pass vmap_method='batched' if it takes a leading batch "
        "axis itself, or vmap_method='loop' to silence this.",
        stacklevel=2,
    )


def _vmap_failure(call: Vmap) -> str | None:
    """Why torch.func.vmap cannot batch `call.inner`: torch's first sentence, which names the op."""
    if not call.inner.composable:
        return "it reads values, or torch.func cannot transform its derivative"
    failure = trial_run(lambda *tensors: _vmap(call, *tensors), call.in_avals)
    return None if failure is None else quote(failure).split(". ")[0].split("\n")[0]


def _vmap(call: Vmap, *tensors: torch.Tensor) -> Tensors:
    return torch.func.vmap(call.inner.run, in_dims=call.in_dims, out_dims=0)(*tensors)


def _loop(call: Vmap, *tensors: torch.Tensor) -> Tensors:
    def example(i: int) -> Tensors:
        return call.inner.run(*(x if d is None else x.select(d, i) for x, d in zip(tensors, call.in_dims, strict=True)))

    return tuple(torch.stack(ys) for ys in zip(*map(example, range(call.size)), strict=True))


def _batched(call: Vmap, *tensors: torch.Tensor) -> Tensors:
    """One call of a natively batched function: batch axes lead, shared operands go in as they are."""
    outs = call.inner.run(*(x if d is None else x.movedim(d, 0) for x, d in zip(tensors, call.in_dims, strict=True)))
    for i, (y, aval) in enumerate(zip(outs, call.inner.out_avals, strict=True)):
        if tuple(y.shape) != (call.size, *aval.shape):
            raise TorchCallError(
                f"vmap of {call.inner.name} with vmap_method='batched': output {i} has shape {tuple(y.shape)} for a "
                f"batch of {call.size}, expected {(call.size, *aval.shape)}. The torch callable does not treat a "
                "leading axis as a batch of independent examples; use vmap_method='auto'."
            )
    return outs


def _empty(call: Vmap, *tensors: torch.Tensor) -> Tensors:
    device = tensors[0].device
    return tuple(
        torch.empty((0, *aval.shape), dtype=dtypes.to_torch_dtype(aval.dtype), device=device)
        for aval in call.inner.out_avals
    )
