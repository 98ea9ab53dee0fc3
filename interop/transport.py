"""The way from a compiled XLA program to a torch call: views of XLA's buffers, no copies, no compiler.

`jax-tvm-ffi` registers one Python function per platform as an XLA FFI target. It receives
`torch.Tensor`s that view XLA's operand and result buffers, and a number that stands for the
`TorchCall`. Numbers start at random in each process, so that a program which JAX's persistent
compilation cache took from another process can never reach a callable of this one.

Where no target is registered for the platform, `jax.pure_callback` carries the call.
"""

import atexit
import functools
import itertools
import secrets
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.interpreters import mlir

from . import dtypes
from .call import Aval, TorchCall, execute
from .errors import TorchCallError, runtime_message

_TARGET = "torchleaf_call"
_numbers = itertools.count(secrets.randbits(62))
_number_of: weakref.WeakKeyDictionary[TorchCall, int] = weakref.WeakKeyDictionary()
_call_of: weakref.WeakValueDictionary[int, TorchCall] = weakref.WeakValueDictionary()


def lower(ctx: mlir.LoweringRuleContext, *operands: Any, call: TorchCall) -> Any:
    """MLIR lowering of one torch call. The executable keeps the callable alive."""
    call.prepare()
    ctx.module_context.add_keepalive(call)
    if set(ctx.module_context.platforms) <= _registered_platforms():
        return mlir.lower_fun(functools.partial(_ffi_call, call), multiple_results=True)(ctx, *operands)
    return mlir.lower_fun(functools.partial(_host_call, call), multiple_results=True)(ctx, *operands)


def _number(call: TorchCall) -> int:
    if call not in _number_of:
        number = next(_numbers)
        _number_of[call], _call_of[number] = number, call
    return _number_of[call]


# --- XLA FFI -----------------------------------------------------------------------------------


def _ffi_call(call: TorchCall, *operands: jax.Array) -> list[jax.Array]:
    buffers = [part for x in operands for part in _parts(x)]
    result_avals = [part for aval in call.out_avals for part in _part_avals(aval)]
    results = jax.ffi.ffi_call(_TARGET, result_avals)(*buffers, number=np.int64(_number(call)))
    return _join_arrays(call.out_avals, results)


def _entry(number: int, *buffers: torch.Tensor) -> None:
    """What XLA calls: operands, then results to be written."""
    call = _call_of.get(number)
    if call is None:
        raise TorchCallError(
            "This program holds a torch call that is not alive in this process: it was compiled by another one "
            "(exported or serialised). Trace and compile it here; a torch callable cannot be serialised."
        )
    failure = None
    try:
        operands, results = _join_tensors(call.in_avals, buffers)
        _write(call, execute(call, *operands), results)
    except Exception as exc:  # every exception of the user's code must cross XLA as text
        failure = runtime_message(call.base.name, exc)
    if failure is not None:  # raised here, the error holds no frame that views XLA's buffers
        raise TorchCallError(failure)


def _entry_cuda(number: int, stream: int, *buffers: torch.Tensor) -> None:
    """As `_entry`, on XLA's stream and device, without synchronising either."""
    device = buffers[0].device
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)):
        _entry(number, *buffers)


@functools.cache
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
    register(_entry, "cpu", [])
    register(_entry_cuda, "gpu", ["ctx.stream"])
    return frozenset({"cpu", "cuda"})


def _drain() -> None:
    """Wait, at exit, for programs in flight: one that enters Python after finalization aborts the process.

    A device runs what it is given in order, so a last trivial program is done after all others.
    """
    for device in jax.local_devices():
        jax.block_until_ready(jax.jit(jnp.negative)(jax.device_put(np.zeros(()), device)))


# --- jax.pure_callback -------------------------------------------------------------------------


@functools.cache
def _warn_about_callback(platforms: tuple[str, ...]) -> None:
    warnings.warn(
        f"torchleaf has no XLA FFI target for {', '.join(platforms)} (package jax-tvm-ffi), so torch calls go through "
        "jax.pure_callback: results are the same, every call copies its operands and results and costs more.",
        stacklevel=2,
    )


def _host_call(call: TorchCall, *operands: jax.Array) -> list[jax.Array]:
    _warn_about_callback((jax.default_backend(),))
    result_avals = tuple(part for aval in call.out_avals for part in _part_avals(aval))

    def host(*arrays: Any) -> tuple[np.ndarray, ...]:
        tensors = [_from_numpy(np.asarray(a)) for a in arrays]
        results = [torch.empty(a.shape, dtype=dtypes.to_torch_dtype(a.dtype)) for a in result_avals]
        _entry(_number(call), *tensors, *results)
        return tuple(_to_numpy(t, a.dtype) for t, a in zip(results, result_avals, strict=True))

    buffers = [part for x in operands for part in _parts(x)]
    return _join_arrays(call.out_avals, jax.pure_callback(host, result_avals, *buffers))


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    bits = np.array(array).view(f"u{array.dtype.itemsize}")  # numpy's own dtypes lack bfloat16
    return torch.from_numpy(bits).view(dtypes.to_torch_dtype(array.dtype))


def _to_numpy(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    bits = tensor.view(getattr(torch, f"uint{8 * tensor.itemsize}"))
    return bits.numpy().view(dtype)


# --- complex values travel as their real and imaginary parts -------------------------------------


def _is_complex(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.complexfloating)


def _parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if _is_complex(x) else [x]


def _part_avals(aval: Aval) -> list[Aval]:
    if not _is_complex(aval):
        return [aval]
    return [Aval(aval.shape, jnp.finfo(aval.dtype).dtype)] * 2


def _join_arrays(avals: Sequence[Aval], parts: Sequence[jax.Array]) -> list[jax.Array]:
    feed = iter(parts)
    return [jax.lax.complex(next(feed), next(feed)) if _is_complex(a) else next(feed) for a in avals]


def _join_tensors(avals: Sequence[Aval], buffers: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
    feed = iter(buffers)
    operands = [torch.complex(next(feed), next(feed)) if _is_complex(a) else next(feed) for a in avals]
    return operands, feed


def _write(call: TorchCall, outs: Sequence[torch.Tensor], results: Any) -> None:
    """Write what torch returned into XLA's result buffers."""
    for i, (out, aval) in enumerate(zip(outs, call.out_avals, strict=True)):
        if tuple(out.shape) != aval.shape:
            raise TorchCallError(
                f"{call.name}: output {i} has shape {tuple(out.shape)} at run time, but {aval.shape} was traced or "
                "declared by `out_shape`. XLA needs shapes that do not depend on values: return a padded array and "
                "a mask."
            )
        if _is_complex(aval):
            next(results).copy_(out.real)
            next(results).copy_(out.imag if out.is_complex() else torch.zeros_like(out))
        else:
            next(results).copy_(out)
