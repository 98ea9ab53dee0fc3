"""Running a JAX call on tensors: views of torch's memory in, views of XLA's out."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import torch

from ..internals.jax import is_tracing, view_as_array, view_as_tensor
from ..internals.transforms import is_wrapped
from ..process.nesting import depth_here
from ..values import dtypes
from ..values.arrays import array_to_torch, as_jax_has_it, is_aligned
from ..values.device import CPUS
from .call import JaxCall
from .errors import failure
from .settings import entered, settings_here
from .views import as_array, as_tensor

_is_forked = False


def _notice_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or CPUS.are_used()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_notice_fork)


def run(call: JaxCall, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of a call, in memory of their own."""
    if _is_forked:
        raise RuntimeError(
            f"{call.name} is called in a process that was forked after JAX had started: JAX's threads are not in it, "
            "and it would wait for them forever. Start the process by `spawn` instead: "
            "`DataLoader(..., multiprocessing_context='spawn')`, `torch.multiprocessing.get_context('spawn')`."
        )
    if is_tracing() or settings_here() != call.settings:
        with _surroundings(call):
            return _run(call, tensors)
    return _run(call, tensors)


def _run(call: JaxCall, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    depth = depth_here()
    arrays = [_array(x, d, call, depth) for x, d in zip(tensors, call.dtypes, strict=True)]
    try:
        is_within = depth and tensors and tensors[0].is_cuda
        outs = (call.program_within() if is_within else call.program)(*arrays)
        is_on_cpu = tensors[0].is_cpu if tensors else all(next(iter(y.devices())).platform == "cpu" for y in outs)
        if is_on_cpu:
            # XLA may still be reading operands, into which torch may write as soon as this returns. On a GPU, torch's
            # stream waits for the outputs instead.
            for y in outs:
                y.block_until_ready()
    except Exception as exc:
        raise failure(call.name, call.avals, exc) from exc
    if not is_on_cpu:
        return tuple(map(array_to_torch, outs))
    # Without operands, arrays are where they are by chance, and for other programs than those that tensors give.
    return tuple(map(view_as_tensor if depth or not tensors else as_tensor, outs))


def _surroundings(call: JaxCall) -> contextlib.AbstractContextManager[Any]:
    """JAX as it was when the call was made, outside of traces: backward runs wherever torch wants."""
    stack = contextlib.ExitStack()
    stack.enter_context(entered(call.settings))
    if is_tracing():
        stack.enter_context(jax.ensure_compile_time_eval())
    return stack


def _array(tensor: torch.Tensor, dtype: torch.dtype, call: JaxCall, depth: int) -> jax.Array:
    if tensor.dtype != dtype:
        if dtypes.is_inexact_tensor(tensor) or dtypes.canonical(tensor.dtype) != dtypes.to_jax_dtype(dtype):
            raise RuntimeError(f"{call.name} was traced for an operand of {dtype}, and is given {tensor.dtype}.")
        tensor = as_jax_has_it(tensor, copy=False, name=f"an operand of {call.name}")  # 64 bits, where JAX has 32
    if is_wrapped(tensor):
        tensor = tensor.detach()  # a transform that is over leaves its wrapper behind
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if not (tensor.is_contiguous() and is_aligned(tensor)):  # a layout of its own would be a compilation of its own
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    if depth and not tensor.untyped_storage().resizable():
        # XLA's own, for as long as the torch call runs that this is in; the program lets go of it some time after that.
        tensor = tensor.clone()
    if not tensor.is_cpu:
        return jax.dlpack.from_dlpack(tensor.detach())
    return view_as_array(tensor, CPUS.at(depth)) if depth else as_array(tensor, CPUS.at(0))
