"""The torch side of a compiled call: a number from XLA becomes a `TorchCall` run on views of XLA's buffers.

Numbers start at random in each process, so that a program which JAX's persistent compilation cache took from another
process can never reach a callable of this one. Complex values travel as their real and imaginary parts.
"""

import gc
import itertools
import secrets
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import torch

from .call import Aval, Tensors, TorchCall, execute
from .errors import TorchCallError, runtime_message

_numbers = itertools.count(secrets.randbits(62))
_program_of: "weakref.WeakKeyDictionary[TorchCall, Program]" = weakref.WeakKeyDictionary()
_by_number: "weakref.WeakValueDictionary[int, TorchCall]" = weakref.WeakValueDictionary()


def program_of(call: TorchCall) -> "Program":
    """The program of a call, one per call."""
    if call not in _program_of:
        program = _program_of[call] = Program(call)
        _by_number[program.number] = call
    return _program_of[call]


def run_program(number: int, *buffers: torch.Tensor) -> None:
    """What XLA calls: the operands, then the results to be written."""
    call = _by_number.get(number)
    if call is None:
        raise TorchCallError(
            "This program holds a torch call that is not alive in this process: it was compiled by another one "
            "(exported or serialised). Trace and compile it here; a torch callable cannot be serialised."
        )
    failure = None
    try:
        _program_of[call].run(call, buffers)
    except Exception as exc:  # every exception of the user's code must cross XLA as text
        failure = runtime_message(call.base.name, call.base.signature, exc)
    if failure is not None:  # raised here, the error holds no frame that views XLA's buffers
        raise TorchCallError(failure)


class Program:
    """How a call reads operand buffers and writes result buffers; it does not keep the call alive."""

    def __init__(self, call: TorchCall):
        self.number = next(_numbers)
        self._in_parts = [is_complex(aval) for aval in call.in_avals]
        self._n_buffers = len(self._in_parts) + sum(self._in_parts)
        self._outs = [(aval.shape, is_complex(aval)) for aval in call.out_avals]

    def run(self, call: TorchCall, buffers: Tensors) -> None:
        """Run the call on its operands and write what torch returned into XLA's result buffers."""
        operands, results = buffers[: self._n_buffers], buffers[self._n_buffers :]
        if self._n_buffers != len(self._in_parts):
            operands = self._join(operands)
        self._write(call, execute(call, *operands), iter(results))
        self._check_escapes(call, buffers[: self._n_buffers])

    def _write(self, call: TorchCall, outs: Tensors, results: Iterator[torch.Tensor]) -> None:
        for i, (out, (shape, has_parts)) in enumerate(zip(outs, self._outs, strict=True)):
            if out.shape != shape:
                raise TorchCallError(
                    f"{call.name}: output {i} has shape {tuple(out.shape)} at run time, but {shape} was traced or "
                    "declared by `out_shape`. XLA needs shapes that do not depend on values: return a padded array "
                    "and a mask."
                )
            if has_parts:
                next(results).copy_(out.real)
                next(results).copy_(out.imag if out.is_complex() else torch.zeros_like(out))
            else:
                next(results).copy_(out)

    def _check_escapes(self, call: TorchCall, buffers: Tensors) -> None:
        """Refuse to leave behind tensors that view XLA's buffers, whose memory is reused at once."""
        if all(_holders(x) == _ALONE for x in buffers):
            return
        gc.collect()  # reference cycles are not escapes
        escaped = [i for i, x in enumerate(buffers) if _holders(x) > _ALONE]
        if escaped:
            which = ", ".join(call.base.operand_name(i) for i in escaped)
            raise TorchCallError(
                f"{call.base.name} keeps {which} (or a view of it) after it returns, whose memory belongs to XLA and is "
                "reused at once. Return the tensor as an output, or store `tensor.clone()`."
            )

    def _join(self, buffers: Sequence[torch.Tensor]) -> Tensors:
        feed = iter(buffers)
        return tuple(torch.complex(next(feed), next(feed)) if parts else next(feed) for parts in self._in_parts)


def _holders(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ALONE = _holders(torch.zeros(1))
"""How many hold the storage of a tensor that has no views."""


def is_complex(aval: Any) -> bool:
    """Whether values of the aval travel in two parts."""
    return jnp.issubdtype(aval.dtype, jnp.complexfloating)


def part_avals(avals: Sequence[Aval]) -> list[Aval]:
    """The avals of the buffers that carry values of `avals`."""
    return [
        Aval(aval.shape, jnp.finfo(aval.dtype).dtype if is_complex(aval) else aval.dtype)
        for aval in avals
        for _ in range(1 + is_complex(aval))
    ]
