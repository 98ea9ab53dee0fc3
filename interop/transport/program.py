"""The torch side of a compiled call: a number from XLA becomes a `TorchCall` run on views of XLA's buffers.

Numbers start at random in each process, so that a program which JAX's persistent compilation cache took from another
process can never reach a callable of this one. Complex values travel as their real and imaginary parts.
"""

import functools
import gc
import itertools
import logging
import secrets
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import torch

from ..calls.call import TorchCall, graphless
from ..calls.cycles import free_circular_graphs
from ..calls.execution import execute
from ..calls.handles import is_signed, number_in, sign
from ..calls.residuals import discard, hand_over, in_part
from ..errors import TorchCallError, runtime_message
from ..internals.autograd_thread import meet_autograd
from ..internals.memory import storage_holders
from ..modes.autocast import without_inference
from ..process.nesting import run_at
from ..replay.repeated import ops_alone
from ..types import Aval, Tensors
from ..values.memory import storage_of
from . import threads
from .handle_flow import HandleFlow

_numbers = itertools.count(secrets.randbits(62))
_running: list[int] = []
_programs: "weakref.WeakKeyDictionary[TorchCall, dict[tuple[bool, int, bool], Program]]" = weakref.WeakKeyDictionary()
_by_number: "dict[int, Program]" = {}


def program_of(
    call: TorchCall,
    *,
    repeats: bool,
    depth: int = 0,
    flow: HandleFlow | None = None,
    parts: tuple[int, ...] | None = None,
    in_step: bool = False,
) -> "Program":
    """The program of a call, which is part of one that `repeats` it or stands alone, at a `depth` (`nesting.py`), and
    `in_step` with those of other devices.

    With the `flow` of handles in one's module, a call that makes or takes one has a program of its own there; so has
    one of the `parts` into which a call is split.
    """
    if parts is not None:
        return _enlist(call, OfPart(call, parts, repeats=repeats, in_step=in_step))
    if flow is not None and (call.makes_handle or call.handle_operand is not None):
        return _enlist(call, InFlow(call, flow, in_step=in_step))
    programs = _programs.setdefault(call, {})
    kind = repeats, depth, in_step
    if kind not in programs:
        programs[kind] = _enlist(call, Program(call, repeats=repeats, depth=depth, in_step=in_step))
    return programs[kind]


def _enlist(call: TorchCall, program: "Program") -> "Program":
    _by_number[program.number] = program
    weakref.finalize(call, _by_number.pop, program.number).atexit = False
    return program


def run_program(number: int, *buffers: torch.Tensor) -> None:
    """What XLA calls: the operands, then the results to be written."""
    threads.keep_python_state()
    program = _by_number.get(number)
    call = None if program is None else program.call()
    if program is None or call is None:
        raise TorchCallError(
            "This program holds a torch call that is not alive in this process: it was compiled by another one "
            "(exported or serialised). Trace and compile it here; a torch callable cannot be serialised."
        )
    work = functools.partial(program.attempt, call, buffers)
    _running.append(number)
    try:
        failure = threads.run(work, call.flops) if buffers and buffers[0].is_cpu else work()
    except BaseException as exc:  # Ctrl-C while waiting for it
        failure = runtime_message(call.base.name, call.base.signature, exc)
    finally:
        _running.remove(number)
    if failure is not None:
        program.fail(failure, buffers)


def uses_captured_tensors(number: int) -> bool:
    """Whether the call of a program may compute with tensors that are not operands."""
    program = _by_number.get(number)
    call = None if program is None else program.call()
    return call is not None and call.base.facts.captures


def wait_until_idle() -> None:
    """Return when no call has been running for a moment, which is longer than XLA takes between two."""
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < _MOMENT:
        time.sleep(_MOMENT / 10)
        if _running:
            idle_since = time.monotonic()


_MOMENT = 0.02  # seconds
_log = logging.getLogger("torchleaf")
_IN_STEP = (
    "That was on one device of a program for several. The others wait for its results, so it went on with NaN in their "
    "place (integers as large as they get, bools true)."
)


class Program:
    """How a call reads operand buffers and writes result buffers; it does not keep the call alive."""

    def __init__(self, call: TorchCall, *, repeats: bool, depth: int = 0, in_step: bool = False):
        self.number, self.call, self._repeats = next(_numbers), weakref.ref(call), repeats
        self._depth, self._in_step = depth, in_step
        self._in_parts = [is_complex(aval) for aval in call.in_avals]
        self._n_buffers = len(self._in_parts) + sum(self._in_parts)
        self._makes_handle = call.makes_handle
        out_avals = call.out_avals[:-1] if self._makes_handle else call.out_avals
        self._outs = [(aval.shape, is_complex(aval)) for aval in out_avals]

    def attempt(self, call: TorchCall, buffers: Tensors) -> str | None:
        """Run the call; an error as text, which holds no frame that views XLA's buffers."""
        try:
            run_at(self._depth + 1, self.run, call, buffers)
        except BaseException as exc:  # every exception of the user's code must cross XLA, SystemExit too
            return runtime_message(call.base.name, call.base.signature, exc)
        return None

    def fail(self, failure: str, buffers: Tensors) -> None:
        """Raise the error of a run. Where other devices would then wait for this one until XLA ends the process, it
        goes on in step, with NaN, and the error is logged."""
        if not self._in_step:
            raise TorchCallError(failure)
        _log.error("%s\n\n%s", failure, _IN_STEP)
        n_results = sum(1 + has_parts for _, has_parts in self._outs) + self._makes_handle
        for result in buffers[len(buffers) - n_results :]:
            is_inexact = result.is_floating_point() or result.is_complex()
            result.fill_(torch.nan if is_inexact else result.dtype == torch.bool or torch.iinfo(result.dtype).max)

    def run(self, call: TorchCall, buffers: Tensors) -> None:
        """Run the call on its operands and write what torch returned into XLA's result buffers."""
        if self._repeats and self._replay(call, buffers):
            return
        buffers = without_inference(buffers)
        operands = buffers[: self._n_buffers]
        before = _holders(operands)
        results = iter(buffers[self._n_buffers :])
        outs = execute(call, *(self._join(operands) if any(self._in_parts) else operands), repeats=self._repeats)
        self._write(call, outs, results)
        del outs
        if _holders(operands) != before:
            if operands[0].is_cuda:
                meet_autograd(operands[0].device)  # its thread may hold a cotangent that it returned
            if _holders(operands) != before:
                gc.collect()  # reference cycles are not escapes
            if _escaped(operands, before):
                call.execution.forget(buffers[self._n_buffers :])
            if _escaped(operands, before):
                free_circular_graphs({storage_of(x) for x in operands})
            self._refuse_escapes(call, _escaped(operands, before))

    def _replay(self, call: TorchCall, buffers: Tensors) -> bool:
        """Whether earlier runs of the call gave the results."""
        try:
            with ops_alone():
                return call.execution.replay(buffers[: self._n_buffers], buffers[self._n_buffers :])
        except Exception:
            return False  # the call as it is raises it from the user's own code

    def _write(self, call: TorchCall, outs: Tensors, results: Iterator[torch.Tensor]) -> None:
        for i, (out, (shape, has_parts)) in enumerate(zip(outs, self._outs, strict=False)):
            if out.shape != shape:
                raise TorchCallError(
                    f"{call.name}: output {i} has shape {tuple(out.shape)} at run time, but {shape} was traced or "
                    "declared by `out_shape`. XLA needs shapes that do not depend on values: return a padded array "
                    "and a mask."
                )
            out = out.detach()
            if has_parts:
                next(results).copy_(out.real)
                next(results).copy_(out.imag if out.is_complex() else torch.zeros_like(out))
            else:
                next(results).copy_(out)
        if self._makes_handle:
            hand_over(next(results), number_in(outs[-1]))

    def _refuse_escapes(self, call: TorchCall, escaped: Sequence[int]) -> None:
        """Leave no tensors behind that view XLA's buffers, whose memory is reused at once."""
        if escaped:
            operand_of = [i for i, parts in enumerate(self._in_parts) for _ in range(1 + parts)]
            which = ", ".join(call.base.operand_name(operand_of[i]) for i in escaped)
            raise TorchCallError(
                f"{call.base.name} keeps {which} (or a view of it) after it returns, whose memory belongs to XLA "
                "and is reused at once. Return the tensor as an output, or store `tensor.clone()`."
            )

    def _join(self, buffers: Sequence[torch.Tensor]) -> Tensors:
        feed = iter(buffers)
        return tuple(torch.complex(next(feed), next(feed)) if parts else next(feed) for parts in self._in_parts)


class OfPart(Program):
    """The program of a call that makes or takes a handle, on one of the parts into which its batches are split; one
    more operand says which: int32[]."""

    def __init__(self, call: TorchCall, parts: tuple[int, ...], *, repeats: bool, in_step: bool):
        super().__init__(call, repeats=repeats, in_step=in_step)
        self._parts = parts

    def run(self, call: TorchCall, buffers: Tensors) -> None:
        which = int(buffers[self._n_buffers])
        with in_part((self._parts, which)):
            super().run(call, (*buffers[: self._n_buffers], *buffers[self._n_buffers + 1 :]))


class InFlow(Program):
    """The program of a call that makes or takes a handle on a GPU: it does without a graph unless the handle goes
    straight from one to the other, as the first runs have to show."""

    def __init__(self, call: TorchCall, flow: HandleFlow, *, in_step: bool):
        super().__init__(call, repeats=True, in_step=in_step)
        graphless_call, kept = graphless(call)
        graphless_call.execution.prepare()
        self._graphless = Program(graphless_call, repeats=True)
        first = [0, *itertools.accumulate(1 + parts for parts in self._in_parts)]
        self._kept = [n for i in kept for n in range(first[i], first[i + 1])]
        self._flow = flow
        self._taken = None if call.handle_operand is None else first[call.handle_operand]
        if self._taken is None:
            flow.add_maker(self.number)
        else:
            flow.add_taker(self.number, self._taken)

    def run(self, call: TorchCall, buffers: Tensors) -> None:
        straight = self._flow.is_straight(self.number)
        if straight and self._taken is not None:
            handle = buffers[self._taken]
            straight = self._flow.prove(self.number, lambda: is_signed(handle))
            if not straight:
                discard(handle)
        if straight:
            super().run(call, buffers)
            if self._makes_handle and not self._flow.is_proven:
                sign(buffers[-1])
        else:
            operands, results = [buffers[i] for i in self._kept], buffers[self._n_buffers :]
            self._graphless.run(graphless(call)[0], (*operands, *(results[:-1] if self._makes_handle else results)))


def _holders(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How many hold each tensor or its storage."""
    return [sys.getrefcount(x) + storage_holders(x) for x in tensors]


def _escaped(tensors: Sequence[torch.Tensor], before: Sequence[int]) -> list[int]:
    """Those that more hold than before."""
    return [i for i, (a, b) in enumerate(zip(before, _holders(tensors), strict=True)) if b > a]


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
