"""Replays on a GPU as CUDA graphs: what a recording launches kernel by kernel is launched at once.

A graph reads and writes fixed addresses. XLA gives the buffers of a program the same ones again and again, one or two
sets of them in a training loop. So there is a graph for each set, captured when the set comes for the second time.

Where other programs share the memory, sets hardly ever come again. Then one graph serves them all: it has memory of its
own for the buffers that move, which are copied there and back, and reads the others, as weights, where they are.

What a forward half keeps for its backward half lies in memory of its graph. It belongs to one pair of calls at a time:
another forward call by the same graph, before that pair is done, runs op by op. All of it runs on XLA's one stream,
so that "done" is a matter of the order in which calls are made.

Source: [CUDA graphs in torch](https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Set
from typing import Any

import torch

from ..internals.memory import copy_each

Replay = Callable[..., list[torch.Tensor]]
Tensors = tuple[torch.Tensor, ...]
Key = tuple[Any, ...]
"""The number of the graph that made what is kept, the stream, and the addresses."""

MOST_BYTES = 2**28
"""Memory that a replay needs at a time, up to which it is captured: a graph keeps it for as long as it is there."""
_MOST_GRAPHS = 8  # of one replay, for fixed sets
_MOST_SEEN = 256  # sets of addresses
_PATIENCE = 8  # calls without a graph, after which one is made for all sets
_MOST_ROAMING = 4  # times that such a one is made
_MOST_COPIED = 2**26  # bytes

_numbers = itertools.count(1)
_one_at_a_time = threading.Lock()  # a process may have no more than one capture under way, and all are on one stream
_logger = logging.getLogger(__name__)


class Captured:
    """A `Replay` of half a call or of a whole one, by CUDA graphs once addresses repeat.

    **Arguments:**

    - `run`: the replay, op by op.
    - `n_inputs`: how many of the tensors it takes are inputs; it writes into the others.
    """

    def __init__(self, run: Replay, n_inputs: int):
        self._run, self._n_inputs, self._lock = run, n_inputs, threading.Lock()
        self._graphs: dict[Key, _Graph] = {}
        self._roaming: dict[Key, _Graph] = {}
        self._seen: set[Key] = set()
        self._key: Key | None = None  # of the first call
        self._moving: Set[int] = frozenset()
        self._misses = self._roams = 0
        self._can_capture = True

    def __call__(self, kept: list[torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Run the ops; `kept` is used up."""
        source = kept.graph if isinstance(kept, _Kept) else None
        graph = None if kept and source is None else self._graph_for(source, kept, tensors)
        try:
            return self._run(kept, *tensors) if graph is None else graph.launch(tensors)
        finally:
            if source is not None:
                kept.clear()
                source.release()

    def _graph_for(self, source: "_Graph | None", kept: Any, tensors: Tensors) -> "_Graph | None":
        """A graph for these addresses that is free; without one, it may be captured now, for the calls that follow."""
        if not self._can_capture:
            return None
        stream = torch.cuda.current_stream(tensors[0].device)
        key = source and source.number, stream.cuda_stream, *(x.data_ptr() for x in tensors)
        graph = self._graphs.get(key)
        if graph is None and self._roaming:
            graph = self._roaming.get(self._fixed(key))
        if graph is not None:
            return graph if graph.take() else None
        with self._lock:
            self._note_moves(key)
            if key in self._seen and len(self._graphs) < _MOST_GRAPHS:
                self._capture(self._graphs, key, kept, tensors, stream)
            elif self._misses >= _PATIENCE and self._can_roam(tensors):
                self._misses, self._roams = 0, self._roams + 1
                self._capture(self._roaming, self._fixed(key), kept, tensors, stream, self._moving)
            elif len(self._seen) < _MOST_SEEN:
                self._seen.add(key)
        return None

    def _note_moves(self, key: Key) -> None:
        self._misses += 1
        self._key = self._key or key
        moving = {i for i, (first, now) in enumerate(zip(self._key[2:], key[2:], strict=True)) if first != now}
        if not moving <= self._moving:  # graphs that read one of them in its place will not fit again
            self._moving |= moving
            self._roaming = {}

    def _fixed(self, key: Key) -> Key:
        """What has to be the same for a graph that has memory of its own for the buffers that move."""
        return *key[:2], *(address for i, address in enumerate(key[2:]) if i not in self._moving)

    def _can_roam(self, tensors: Tensors) -> bool:
        return self._roams < _MOST_ROAMING and sum(tensors[i].nbytes for i in self._moving) <= _MOST_COPIED

    def _capture(
        self,
        graphs: "dict[Key, _Graph]",
        key: Key,
        kept: Any,
        tensors: Tensors,
        stream: Any,
        moving: Set[int] = frozenset(),
    ) -> None:
        """Capture a graph, on a stream of its own: XLA gives work to its stream from other threads meanwhile."""
        side = _side_stream(tensors[0].device)
        with _one_at_a_time:
            try:
                side.wait_stream(stream)
                with torch.cuda.stream(side):
                    self._run(list(kept), *tensors)  # libraries allocate for a stream when they first meet it
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        own = {i: torch.empty_like(tensors[i]) for i in sorted(moving)}
                        made = self._run(list(kept), *(own.get(i, x) for i, x in enumerate(tensors)))
                    finally:
                        graph.capture_end()
                graphs[key] = _Graph(graph, made, own, self._n_inputs)
            except Exception as exc:  # an op that waits for the device, for instance
                self._can_capture = False
                _logger.debug("a replay cannot be captured as a CUDA graph: %s", exc)
            finally:
                stream.wait_stream(side)  # which would draw it into the next capture on that stream


class _Graph:
    """A captured graph, what it keeps for the next half, and its own memory for buffers that move, by their place."""

    def __init__(self, graph: Any, kept: list[torch.Tensor], own: dict[int, torch.Tensor], n_inputs: int):
        self._graph, self._kept = graph, kept
        self._given = {i: x for i, x in own.items() if i < n_inputs}
        self._results = {i: x for i, x in own.items() if i >= n_inputs}
        self._free = threading.Semaphore()
        self.number = next(_numbers)

    def take(self) -> bool:
        """Whether it is free, as it is no more then."""
        return self._free.acquire(blocking=False)

    def launch(self, tensors: Tensors) -> list[torch.Tensor]:
        """Run it; what it keeps is to be released."""
        try:
            if self._given:
                copy_each([*self._given.values()], [tensors[i] for i in self._given])
            self._graph.replay()
            if self._results:
                copy_each([tensors[i] for i in self._results], [*self._results.values()])
        except BaseException:
            self.release()
            raise
        if self._kept:
            return _Kept(self._kept, self)
        self.release()
        return []

    def release(self) -> None:
        """What it kept is not needed any more."""
        self._free.release()


class _Kept(list[torch.Tensor]):
    """What a graph keeps for one backward half; the graph is free again when that has run, or when this is dropped."""

    def __init__(self, tensors: list[torch.Tensor], graph: _Graph):
        super().__init__(tensors)
        self.graph = graph

    def __del__(self) -> None:
        if self:  # no backward half has used it up
            self.graph.release()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
