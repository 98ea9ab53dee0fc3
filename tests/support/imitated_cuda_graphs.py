"""CUDA graphs imitated on the CPU: ops are captured with their memory, and launched on it again."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchleaf.interop.replay import cuda_graphs


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if "empty" not in func.name():
            self.ops.append((func, args, kwargs or {}, made))
        return made


class Graph:
    """`torch.cuda.CUDAGraph`, for ops whose results are no views."""

    def capture_begin(self, capture_error_mode):
        self._recording = _Recording()
        self._recording.__enter__()

    def capture_end(self):
        self._recording.__exit__(None, None, None)

    def replay(self):
        for func, args, kwargs, made in self._recording.ops:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)


class Stream:
    """`torch.cuda.Stream`."""

    cuda_stream = 7

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


def imitate(monkeypatch):
    """`torch.cuda` as far as captures need it."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda_graphs, "_side_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
