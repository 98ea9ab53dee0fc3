"""The way from a compiled XLA program to a torch call: views of XLA's buffers, no copies, no compiler.

`jax-tvm-ffi` registers one Python function per platform as an XLA FFI target. It receives `torch.Tensor`s that view
XLA's operand and result buffers, and the number of a program (`program.py`). Where no target is registered for the
platform, `jax.pure_callback` carries the call.

Source: [JAX FFI](https://docs.jax.dev/en/latest/ffi.html), [jax-tvm-ffi](https://github.com/NVIDIA/jax-tvm-ffi).
"""

import atexit
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.interpreters import mlir

from ..calls.call import TorchCall
from ..calls.handles import BY_PLACE
from ..internals.autograd_thread import meet_autograd
from ..internals.jax import devices_of, is_for_one_device
from ..process.once import Once
from ..types import Aval
from ..values import dtypes
from ..values.device import CPUS
from . import threads
from .handle_flow import flow_of
from .program import Program, is_complex, part_avals, program_of, run_program, uses_captured_tensors, wait_until_idle

_TARGET = "torchleaf_call"


def lower(ctx: mlir.LoweringRuleContext, *operands: Any, call: TorchCall, repeats: bool) -> Any:
    """MLIR lowering of one torch call. The executable of a program that `repeats` it keeps it alive."""
    threads.settle()
    carry = carrier(ctx.module_context, call, repeats=repeats)
    return mlir.lower_fun(carry, multiple_results=True)(ctx, *operands)


def carrier(
    module: Any, call: TorchCall, *, repeats: bool, parts: tuple[int, ...] | None = None
) -> Callable[..., list[jax.Array]]:
    """What carries a call in a module that is being lowered: a JAX function of its operands.

    Of one of the `parts` into which a call is split it takes one more operand: which one.
    """
    _Forks.refuse()
    call.execution.prepare()
    if repeats:
        module.add_keepalive(call)
    platforms, in_step = set(module.platforms), not is_for_one_device(module.axis_context)
    if has_target(module):
        depth = CPUS.depth_of(devices_of(module.axis_context))
        flow = flow_of(module) if repeats and platforms & BY_PLACE and parts is None else None
        program = program_of(call, repeats=repeats, depth=depth, flow=flow, parts=parts, in_step=in_step)
        return functools.partial(_ffi_call, call, program)
    return functools.partial(_host_call, call, program_of(call, repeats=repeats, parts=parts, in_step=in_step))


def has_target(module: Any) -> bool:
    """Whether calls in a module go straight to torch, on each of its platforms."""
    return set(module.platforms) <= _registered_platforms()


class _Forks:
    """XLA's threads do not survive a fork, and compiling in the child would wait for them for ever."""

    used = forked = False

    @classmethod
    def note(cls) -> None:
        """Called in the child."""
        cls.forked = cls.used

    @classmethod
    def refuse(cls) -> None:
        """Raise in a process that was forked from one in which programs were compiled."""
        cls.used = True
        if cls.forked:
            raise RuntimeError(
                "This process was forked from one in which JAX had compiled a program; XLA's threads do not survive a "
                'fork, and compiling would hang. Start workers by `multiprocessing.get_context("spawn")`.'
            )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Forks.note)


# --- XLA FFI -----------------------------------------------------------------------------------


def _ffi_call(call: TorchCall, program: Program, *operands: jax.Array) -> list[jax.Array]:
    target = jax.ffi.ffi_call(_TARGET, part_avals(call.out_avals))
    return _join(call.out_avals, target(*_parts(operands), number=np.int64(program.number)))


def _run_on_cuda(number: int, stream: int, *buffers: torch.Tensor) -> None:
    """Run on XLA's stream and device, without synchronising either."""
    device = buffers[0].device
    xla, users = _stream(stream, device), torch.cuda.current_stream(device)
    captures = uses_captured_tensors(number)
    if captures:  # which may still be written on the user's stream, or will be
        xla.wait_stream(users)
    with torch.cuda.stream(xla):  # and its device
        run_program(number, *buffers)
    if captures:
        users.wait_stream(xla)


@functools.cache
def _stream(stream: int, device: torch.device) -> torch.cuda.ExternalStream:
    _wake_autograd(device)
    return torch.cuda.ExternalStream(stream, device=device)


_wake_autograd = functools.cache(meet_autograd)


@Once
def _registered_platforms() -> frozenset[str]:
    """Register the FFI targets, once; the platforms that have one."""
    try:
        import jax_tvm_ffi
        import tvm_ffi
    except ImportError:  # no wheel for this system
        return frozenset()

    def register(entry: Callable[..., None], platform: str, context: list[str]) -> None:
        jax_tvm_ffi.register_ffi_target(
            _TARGET,
            tvm_ffi.convert_func(entry, tensor_cls=torch.Tensor),
            arg_spec=["attrs.number", *context, "args", "rets"],
            platform=platform,
            pass_owned_tensor=True,  # a tensor that outlives the call is an error, not a dangling pointer
        )

    atexit.register(_drain)
    register(run_program, "cpu", [])
    register(_run_on_cuda, "gpu", ["ctx.stream"])
    return frozenset({"cpu", "cuda"})


def _drain() -> None:
    """Wait, at exit, for programs in flight: one that enters Python after finalization aborts the process.

    A device runs what one thread gives it in order, so a last trivial program is done after all others of this thread;
    those of other threads are done when no call has been running for a while.
    """
    for device in jax.local_devices():
        jax.block_until_ready(jax.jit(jnp.negative)(jax.device_put(np.zeros(()), device)))
    wait_until_idle()


# --- jax.pure_callback -------------------------------------------------------------------------


@functools.cache
def _warn_about_callback(platform: str) -> None:
    warnings.warn(
        f"torchleaf has no XLA FFI target for {platform} (package jax-tvm-ffi), so torch calls go through "
        "jax.pure_callback: results are the same, every call copies its operands and results and costs more, and in a "
        "program for several devices one of them computes it for all.",
        stacklevel=2,
    )


def _host_call(call: TorchCall, program: Program, *operands: jax.Array) -> list[jax.Array]:
    _warn_about_callback(jax.default_backend())
    result_avals = tuple(part_avals(call.out_avals))

    def host(*arrays: Any) -> tuple[np.ndarray, ...]:
        tensors = [_from_numpy(np.asarray(a)) for a in arrays]
        results = [torch.empty(a.shape, dtype=dtypes.to_torch_dtype(a.dtype)) for a in result_avals]
        run_program(program.number, *tensors, *results)
        return tuple(_to_numpy(t, a.dtype) for t, a in zip(results, result_avals, strict=True))

    return _join(call.out_avals, jax.pure_callback(host, result_avals, *_parts(operands)))


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    bits = np.array(array).view(f"u{array.dtype.itemsize}")  # numpy's own dtypes lack bfloat16
    return torch.from_numpy(bits).view(dtypes.to_torch_dtype(array.dtype))


def _to_numpy(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    bits = tensor.view(getattr(torch, f"uint{8 * tensor.itemsize}"))
    return bits.numpy().view(dtype)


# --- complex values travel as their real and imaginary parts -------------------------------------


def _parts(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [part for x in arrays for part in ((x.real, x.imag) if is_complex(x) else (x,))]


def _join(avals: Sequence[Aval], parts: Sequence[jax.Array]) -> list[jax.Array]:
    feed = iter(parts)
    return [jax.lax.complex(next(feed), next(feed)) if is_complex(a) else next(feed) for a in avals]
