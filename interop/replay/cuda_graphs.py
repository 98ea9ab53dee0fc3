"""Replays on a GPU as CUDA graphs: what a recording launches kernel by kernel is launched at once.

A graph reads and writes fixed addresses. XLA gives the buffers of a program the same ones again and again, one or two
sets of them in a training loop. So there is a graph for each set, captured when the set comes for the second time.

What a forward half keeps for its backward half lies in memory of its graph. It belongs to one pair of calls at a time:
another forward call at the same addresses, before that pair is done, runs op by op. All of it runs on XLA's one stream,
so that "done" is a matter of the order in which calls are made.

Source: [CUDA graphs in torch](https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

Replay = Callable[..., list[torch.Tensor]]

MOST_BYTES = 2**28
"""Memory that the ops of a replay make, up to which it is captured: large calls do not wait for the host anyway."""
_MOST_GRAPHS = 8  # of one replay
_MOST_SEEN = 256  # sets of addresses

_logger = logging.getLogger(__name__)


class Captured:
    """A `Replay` of half a call or of a whole one, by CUDA graphs once addresses repeat."""

    def __init__(self, run: Replay):
        self._run, self._lock = run, threading.Lock()
        self._graphs: dict[Any, _Graph] = {}
        self._seen: set[Any] = set()
        self._can_capture = True

    def __call__(self, kept: list[torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Run the ops; `kept` is used up."""
        source = kept.graph if isinstance(kept, _Kept) else None
        graph = None if kept and source is None else self._graph_for(source, kept, tensors)
        try:
            return self._run(kept, *tensors) if graph is None else graph.launch()
        finally:
            if source is not None:
                kept.clear()
                source.release()

    def _graph_for(self, source: "_Graph | None", kept: Any, tensors: tuple[torch.Tensor, ...]) -> "_Graph | None":
        """A graph for these addresses that is free, captured now if they come for the second time."""
        if not self._can_capture:
            return None
        stream = torch.cuda.current_stream(tensors[0].device)
        key = (source, stream.cuda_stream, *(x.data_ptr() for x in tensors))
        graph = self._graphs.get(key)
        if graph is None:
            with self._lock:
                if key in self._seen and len(self._graphs) < _MOST_GRAPHS:
                    self._capture(key, stream, kept, tensors)
                elif len(self._seen) < _MOST_SEEN:
                    self._seen.add(key)
            return None
        return graph if graph.take() else None

    def _capture(self, key: Any, stream: Any, kept: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        """Capture a graph, on a stream of its own: XLA gives work to its stream from other threads meanwhile."""
        side = _side_stream(tensors[0].device)
        try:
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                self._run(list(kept), *tensors)  # libraries allocate for a stream when they first meet it
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    made = self._run(list(kept), *tensors)
                finally:
                    graph.capture_end()
            self._graphs[key] = _Graph(graph, made)
        except Exception as exc:  # an op that waits for the device, for instance
            self._can_capture = False
            _logger.debug("a replay cannot be captured as a CUDA graph: %s", exc)
        finally:
            stream.wait_stream(side)


class _Graph:
    """A captured graph and what it keeps for the next half."""

    def __init__(self, graph: torch.cuda.CUDAGraph, kept: list[torch.Tensor]):
        self._graph, self._kept = graph, kept
        self._free = threading.Semaphore()

    def take(self) -> bool:
        """Whether it is free, as it is no more then."""
        return self._free.acquire(blocking=False)

    def launch(self) -> list[torch.Tensor]:
        """Run it; what it keeps is to be released."""
        try:
            self._graph.replay()
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
