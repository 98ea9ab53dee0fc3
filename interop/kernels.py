"""Which kernels torch runs: those it can differentiate, in the place of those it cannot.

Fused attention has neither a forward-mode formula nor a second derivative (pytorch issues 98164, 117629,
154226), oneDNN's recurrent layers have no batching rule for their backward. torch's plain kernels have all.
The fast path of `nn.TransformerEncoder` and `nn.MultiheadAttention` runs only where no gradient is asked for and
gives other values at padded positions, so it stays off: a function and its gradient must be of one function.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

NONE: frozenset[str] = frozenset()
ALL = frozenset({"attention", "recurrent"})

_MARKS = {
    "attention": ("attention", "transformer_encoder", "attn"),
    "recurrent": ("rnn", "lstm", "gru"),
}


def fused_kernels(op_name: str) -> frozenset[str]:
    """Which of the replaceable kernels an aten op stands for."""
    return frozenset(kernel for kernel, marks in _MARKS.items() if any(mark in op_name for mark in marks))


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Shared:
    """A global switch of torch's that several threads hold at once: off with the first, on after the last."""

    def __init__(self, enter: Callable[[], contextlib.AbstractContextManager[Any]]):
        self._enter, self._lock = enter, threading.Lock()
        self._users, self._exit = 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._exit.enter_context(self._enter())
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._exit.close()


_SWITCHES = {"attention": _Shared(lambda: sdpa_kernel(SDPBackend.MATH)), "recurrent": _Shared(_without_onednn)}
_FAST_PATH = _Shared(_without_fast_path)


@contextlib.contextmanager
def plain_kernels(kernels: frozenset[str] = ALL) -> Iterator[None]:
    """Run torch's plain kernels instead of the fused ones named."""
    with contextlib.ExitStack() as stack:
        for kernel in sorted(kernels):
            stack.enter_context(_SWITCHES[kernel].held())
        yield


def differentiable_path(kernels: frozenset[str] = ALL) -> contextlib.AbstractContextManager[None]:
    """Run the code torch runs when gradients are wanted, for a callable that uses `kernels`."""
    return _FAST_PATH.held() if "attention" in kernels else contextlib.nullcontext()
