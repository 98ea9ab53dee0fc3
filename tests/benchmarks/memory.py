"""Resident memory of this process, and its peak since a chosen moment."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def settle() -> None:
    """Give freed memory back to the system, so that what remains is in use."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)


def reset_peak() -> int:
    """Begin a new peak where the system can (Linux); returns the memory in use, in bytes."""
    if not _CLEAR.exists():
        return peak()
    _CLEAR.write_text("5")
    return _linux("VmRSS")


def peak() -> int:
    """The highest resident memory since `reset_peak`, in bytes.

    Linux's own figure rather than `ru_maxrss`, which cannot be reset and begins at the parent process's.
    """
    if _STATUS.exists():
        return _linux("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _linux(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
