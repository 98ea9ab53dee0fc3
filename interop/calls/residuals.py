"""Live residuals: torch's autograd graph stays alive between the forward and the backward call.

The forward call (`save.py`) stores its graph here and hands JAX a handle, two integers, as the only extra
residual; the backward call takes the graph out by the handle and runs it. A handle that is not here any more
means recompute, which is always correct: the backward ran before, or is batched, or the graph was evicted.

Where the handle is unused, JAX's dead-code elimination replaces the forward call by a plain one; eagerly, a
finalizer of the handle drops the graph; one that is not asked for all the same is dropped when it has waited long.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import jax
import torch

from .graph import Batch, Graph, Tape
from .handles import number_of, when_dropped, write_handle

_UNASKED, _ROUNDS, _DISCARDED = 64, 16, 3
_graphs: "dict[int, tuple[Residual, Store, Part]]" = {}
_numbers = itertools.count(1)
_running = threading.local()
Residual = Graph | Tape
Part = tuple[tuple[int, ...], int] | None
"""Of a call that is split over devices: how many parts each batch has, and which of them all this is."""


@contextlib.contextmanager
def in_part(part: Part) -> Iterator[None]:
    """Within it a call of this thread is one part of another: a graph is of the examples that it was made for."""
    before, _running.part = _part_here(), part
    try:
        yield
    finally:
        _running.part = before


def _part_here() -> Part:
    return getattr(_running, "part", None)


def live_graphs() -> int:
    """How many autograd graphs wait for their backward call."""
    return len(_graphs)


class Store:
    """The graphs of one `Save` that wait for their backward call.

    Some wait in vain: `cond` under vmap runs both branches, and a handle that no example chose is lost. Dropping a
    graph is always correct, so two kinds are: the oldest of many where none was ever asked for, and those left from
    many rounds ago, a round being forward calls followed by backward ones. Where the graphs go to forward mode, which
    has no use for them, none is kept after the first few.
    """

    def __init__(self) -> None:
        self._round_of: dict[int, int] = {}
        self._round, self._taking, self._asked, self._discarded = 0, False, False, 0

    @property
    def is_vain(self) -> bool:
        """Whether graphs were given away unused, and none was ever asked for."""
        return self._discarded >= _DISCARDED and not self._asked

    def put(self, graph: Residual) -> int:
        """Keep a graph; returns its number."""
        if self._taking:
            self._taking, self._round = False, self._round + 1
            for number, put_in in self._round_of.copy().items():
                if put_in < self._round - _ROUNDS:
                    drop(number)
        number = next(_numbers)
        self._round_of[number] = self._round
        _graphs[number] = graph, self, _part_here()
        if not self._asked and len(self._round_of) > _UNASKED:
            drop(next(iter(self._round_of.copy())))
        return number

    def remove(self, number: int) -> None:
        """Forget a graph."""
        self._round_of.pop(number, None)

    def take(self, number: int) -> None:
        """A graph is taken out to be used."""
        self.remove(number)
        self._taking = self._asked = True

    def discard(self, number: int) -> None:
        """A graph is given away unused."""
        self.remove(number)
        self._discarded += 1


def take_graph(handle: torch.Tensor | None) -> Residual | None:
    """Remove and return the graph of a handle, if it is still there."""
    number = 0 if handle is None else number_of(handle)
    return None if _of_these_examples(number) is None else drop(number, Store.take)


def is_kept(handle: torch.Tensor) -> bool:
    """Whether a graph or tape of these examples waits for this handle."""
    return _of_these_examples(number_of(handle)) is not None


def _of_these_examples(number: int) -> Residual | None:
    graph, _, part = _graphs.get(number, (None, None, None))
    return graph if part == _part_here() else None


def take_tape(handle: torch.Tensor, active: tuple[int, ...], outs: tuple[int, ...], batch: Batch | None) -> Tape | None:
    """Remove and return what the handle stands for, if it is a tape that gives these gradients."""
    number = number_of(handle)
    tape = _of_these_examples(number)
    if not isinstance(tape, Tape) or not tape.gives(active, outs, batch):
        return None
    drop(number, Store.take)
    return tape


def hand_over(handle: torch.Tensor, number: int) -> None:
    """Write a number into a handle; what lay there on a GPU is gone, and so is its graph."""
    before = write_handle(handle, number)
    if before:
        drop(before)


def discard(handle: torch.Tensor | None) -> None:
    """Drop the graph of a handle, for which there is no use."""
    if handle is not None:
        drop(number_of(handle), Store.discard)


def drop_with(handle: jax.Array) -> None:
    """Drop the graph when this handle array dies: for eager calls, whose backward may never come."""
    when_dropped(handle, drop)


def drop(number: int, how: Callable[[Store, int], None] = Store.remove) -> Residual | None:
    """Remove and return what a number stands for, if it is still there."""
    graph, store, _ = _graphs.pop(number, (None, None, None))
    if store is not None:
        how(store, number)
    return graph
