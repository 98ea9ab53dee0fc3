"""Calls of a compiled program, which runs many times: they run as a recording of their ops, unless they are huge.

The first two runs of a call are recorded (`recording.py`). If they did the same, the following ones replay it; Python
has its say no more then, as in every program that `jax.jit` compiled. Otherwise, and where ops depend on values or draw
random numbers, the call runs as it is each time.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import quote
from ..internals.ops import SET_GRAD_ENABLED, ops_only
from .recording import Recorder
from .replays import Code, OtherValueError, Replay, codes_of

Tensors = tuple[torch.Tensor, ...]
Direction = tuple[tuple[int, ...], tuple[int, ...]]

SMALL = 1e9
"""Floating-point operations of a call in which what is not torch's ops weighs much."""
LARGE = 1e11
"""Floating-point operations up to which a call is recorded; the proof takes one run more."""
LARGE_ON_GPU = 1e12
"""The same on a GPU, which does them in the time of a hundred launches."""

_OTHERS = 8
"""How many recordings, and replays, may differ by the values that Python reads."""
_TRIES = 64  # a recording ends in vain where the backward half never comes


class Repeated:
    """The recordings of one call."""

    def __init__(self) -> None:
        self.replays: tuple[Replay, ...] | None = None
        """The call's parts as replays, once that is known to be possible."""
        self.direction: Direction | None = None
        """Of a forward and a backward half: the operands and the outputs by which gradients are taken."""
        self.refusal: str | None = None
        """Why there are no replays, once that is decided."""
        self._first: tuple[Code, ...] | None = None
        self._tries, self._decided, self._others = 0, False, 0
        self._hits = self._misses = 0
        self._under_way: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self._lock = threading.Lock()

    def run(self, work: Callable[..., Tensors], tensors: Tensors) -> Tensors:
        """What `work` returns on `tensors`; it is recorded, if that is not decided yet."""
        recorder = self.recorder()
        if recorder is None:
            return work(*tensors)
        outs = self.record(recorder, tensors, lambda: work(*tensors))
        self.offer(recorder, tensors)
        return outs

    def recorder(self) -> Recorder | None:
        """What to record a run with, if it is to be recorded."""
        with self._lock:
            if self._decided or self._tries == _TRIES or len(self._under_way) == 2:
                return None
            self._tries += 1
            recorder = Recorder()
            self._under_way.add(recorder)
            return recorder

    def record(self, recorder: Recorder, inputs: Tensors, work: Callable[[], Tensors]) -> Tensors:
        """What `work` returns, recorded as the next part unless that fails; then nothing is recorded any more."""
        if self._decided:
            return work()
        try:
            return recorder.record(inputs, work)
        except Exception as exc:  # the callable's own fault, or of an op that does not run in a dispatch mode
            with self._lock:
                self._decided, self._first, self.refusal = True, None, quote(exc)
            return work()

    def offer(self, recorder: Recorder, inputs: Tensors, direction: Direction | None = None) -> None:
        """Take a recording of a whole run, with the inputs of its last part: the second decides."""
        with self._lock:
            if self._decided:
                return
            try:
                codes = None if recorder.failure else codes_of(recorder)
                if codes is not None and self._first is None:
                    self._first, self.direction = codes, direction
                    return
                if codes is not None and self._is_second(codes, direction):
                    replays = _proven(codes, recorder, inputs)
                    self.replays = replays and tuple(map(self._counted, codes, replays))
                elif codes is not None and self._values_differ(codes):
                    self._first, self.direction = codes, direction
                    return
            except Exception:  # of an argument that is like no other, for instance
                self.replays = None
            if self.replays is None:
                self.refusal = recorder.failure or "its runs are not alike"
            self._decided, self._first = True, None

    def _values_differ(self, codes: tuple[Code, ...]) -> bool:
        """Whether it may be for other values that this recording is not like the first one, and another may be."""
        self._others += 1
        return self._others < _OTHERS and any(code.reads for code in codes)

    def _counted(self, code: Code, run: Replay) -> Replay:
        """A replay that is given up where the values that Python has read are others too often."""
        if not code.reads:
            return run

        def counted(*tensors: Any) -> list[torch.Tensor]:
            try:
                kept = run(*tensors)
            except OtherValueError:
                self._misses += 1
                if self._misses > _OTHERS + self._hits // 4:
                    self.replays, self.refusal = None, "it reads other values in most runs"
                raise
            self._hits += 1
            return kept

        return counted

    def _is_second(self, codes: tuple[Code, ...], direction: Direction | None) -> bool:
        first = self._first
        return first is not None and direction == self.direction and all(map(Code.same_as, codes, first))


def _proven(codes: tuple[Code, ...], recorder: Recorder, inputs: Tensors) -> tuple[Replay, ...] | None:
    """The replays, if they give what the recorded run gave: some ops cannot be called as a dispatch mode sees them."""
    kept: list[torch.Tensor] = []
    replays = tuple(code.compile() for code in codes)
    for part, run in zip(recorder.parts, replays, strict=True):
        results = [x.empty() for x in part.results]
        with ops_alone():
            kept = run(kept, *inputs[: len(part.inputs)], *results)
        if not all(_agree(found, x.value()) for found, x in zip(results, part.results, strict=True)):
            return None
    return replays


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two runs of the same ops gave the same bits; on a GPU, which sums in any order, nearly the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return True
    if not a.is_cuda or not a.is_floating_point():
        return False
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * b.nan_to_num(0, 0, 0).abs().max()
    return bool((same | ((a - b).abs() <= tolerance)).all())


@contextlib.contextmanager
def ops_alone() -> Iterator[None]:
    """Around a replay: neither gradients nor autocast, which have had their say. It may leave another grad mode."""
    grad_mode = torch.is_grad_enabled()
    try:
        with ops_only():
            yield
    finally:
        SET_GRAD_ENABLED(grad_mode)
