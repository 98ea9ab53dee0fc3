"""Where a torch call runs on the CPU, and on how many cores.

XLA runs programs on the threads of a pool. OpenMP, with which torch parallelises, keeps a team of threads for each
thread that enters it, and once two teams together outnumber the cores its threads no longer spin while they wait: each
parallel region then pays a wake-up of 50 microseconds. So there is one team:

- a short call runs where XLA calls from, on one core, without a team;
- a long one is handed to one long-lived thread, which has torch's number of threads, and waits its turn. If that takes
  long (it may wait for itself: a call from within a call), it gets another thread for the time.

Which calls are short follows from their operations alone, so that a program gives the same bits each time it runs.

Source: [PyGILState_Ensure](https://docs.python.org/3/c-api/init.html#c.PyGILState_Ensure),
[OpenMP](https://www.openmp.org/spec-html/5.0/openmpse31.html) (omp_pause_resource_all),
[torch's threading](https://docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html).
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..process.once import Once

LONG = 2e6
"""Floating-point operations from which on a call is handed over; those of a hand-over's time on one core."""

_PATIENCE = 0.1  # seconds
_AS_OPENMP = 0  # MKL's own number of threads when none is set
_SOFT = 1  # omp_pause_soft: end the threads, keep the settings


def run(work: Callable[[], Any], flops: float) -> Any:
    """What `work` returns, run where it is fastest; it must not raise."""
    if flops < LONG or _torch_thread().n_threads == 1:
        return _on_one_core(work)
    return _torch_thread().run(work)


class _PythonState(threading.local):
    """What Python keeps for a thread of XLA's: made for each call from C and dropped with it, if none stays open."""

    def __init__(self) -> None:
        ctypes.pythonapi.PyGILState_Ensure()

    def keep(self) -> None:
        """Be made, which happens when a thread first asks for anything of it."""


_python_state = _PythonState()


def keep_python_state() -> None:
    """Keep what Python knows of this thread until it ends: to make it anew takes as long as a small call."""
    _python_state.keep()


def settle() -> None:
    """Called in the user's thread when a program is compiled: take over its number of threads, end its team."""
    _torch_thread().n_threads = torch.get_num_threads()
    _openmp().pause()


class _TorchThread:
    """Runs one piece of work at a time on a thread of its own; where none can be started, work runs where it is."""

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self._busy, self._given, self._done = threading.Lock(), threading.Lock(), threading.Lock()
        self._given.acquire()
        self._done.acquire()
        self._work: Callable[[], Any] | None = None
        self._result: Any = None
        self._thread: threading.Thread | None = threading.Thread(target=self._serve, name="torchleaf", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # since Python 3.12 no thread starts any more once the main thread has ended
            self._thread = None

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` returns."""
        if self._thread is None or threading.get_ident() == self._thread.ident:
            return work()
        if not self._busy.acquire(timeout=_PATIENCE):
            spare = _TorchThread(self.n_threads)
            try:
                return spare.run(work)
            finally:
                spare.stop()
        try:
            self._work = work
            del work
            self._given.release()
            self._wait()
            result, self._result = self._result, None
            return result
        finally:
            self._busy.release()

    def stop(self) -> None:
        """End the thread."""
        self._given.release()

    def _wait(self) -> None:
        """Wait for the work to end: it uses buffers of the caller's, so Ctrl-C is raised after it."""
        try:
            self._done.acquire()
        except BaseException:
            self._wait()
            raise

    def _serve(self) -> None:
        while True:
            self._given.acquire()
            if torch.get_num_threads() != self.n_threads:  # MKL is slower with a number that was set
                torch.set_num_threads(self.n_threads)
            work, self._work = self._work, None
            if work is None:
                return
            self._result = work()
            del work  # it holds tensors that view XLA's buffers
            self._done.release()


@Once
def _torch_thread() -> _TorchThread:
    return _TorchThread(torch.get_num_threads())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_torch_thread.forget)  # threads do not survive a fork


def _on_one_core(work: Callable[[], Any]) -> Any:
    openmp = _openmp()
    n_openmp = torch.get_num_threads()  # in a new thread this sets it, which must not happen in `work`
    n_mkl = openmp.set_mkl_threads(_AS_OPENMP)
    openmp.set_threads(1)
    try:
        return work()
    finally:
        openmp.set_threads(n_openmp)
        if n_mkl != _AS_OPENMP:
            openmp.set_mkl_threads(n_mkl)


class _OpenMP:
    """The OpenMP runtime and the MKL that torch is linked with, where it is; their settings are each thread's own."""

    def __init__(self) -> None:
        library = _torch_library()
        self.set_threads = _symbol(library, "omp_set_num_threads", lambda n: None)
        self.set_mkl_threads = _symbol(library, "MKL_Set_Num_Threads_Local", lambda n: 0)
        self.pause = functools.partial(_symbol(library, "omp_pause_resource_all", lambda kind: 0), _SOFT)


@Once
def _openmp() -> _OpenMP:
    return _OpenMP()


def _torch_library() -> ctypes.PyDLL | None:
    """torch's CPU library, already loaded: symbols are looked up in it and in what it is linked with."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    return ctypes.PyDLL(str(path)) if path.exists() else None


def _symbol(library: ctypes.PyDLL | None, name: str, absent: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(library, name, absent)
