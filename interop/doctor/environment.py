"""What the machine and the settings give: devices, GPU memory, threads, dtypes, dispatch, compilation cache."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import torch

from .report import Check, Finding, quoted

_GIB = 2**30
_SCARCE = 0.1  # of a GPU's memory


@dataclass(frozen=True)
class Backend(Check):
    """JAX's default platform; where JAX cannot start, the error and what `jax_platforms` says."""

    platform: str
    error: str
    jax_platforms: str

    @classmethod
    def gather(cls) -> "Backend":
        platform, error = "", ""
        try:
            platform = jax.default_backend()
        except Exception as exc:
            error = quoted(exc)
        return cls(platform, error, jax.config.values["jax_platforms"] or "")

    def findings(self) -> list[Finding]:
        if not self.error:
            return [Finding("jax platform", self.platform)]
        remedy = "Reinstall JAX for this machine; everything below follows from it."
        if self.jax_platforms:
            remedy = f"JAX_PLATFORMS is '{self.jax_platforms}': unset it, or name platforms that are installed."
        return [Finding("jax platform", f"JAX does not start: {self.error}", "broken", remedy)]


@dataclass(frozen=True)
class Gpus(Check):
    """How many GPUs each framework sees and, where it sees none, what it says.

    `cuda` is the CUDA version torch is built for, if it is; `driver` whether the machine has an NVIDIA driver.
    """

    jax: int
    torch: int
    jax_error: str
    torch_error: str
    cuda: str
    driver: bool
    jax_platforms: str
    visible: str

    @classmethod
    def gather(cls) -> "Gpus":
        n_jax, jax_error = 0, ""
        try:
            n_jax = len(jax.local_devices(backend="gpu"))
        except Exception as exc:  # JAX_PLATFORMS=cuda without CUDA is an AssertionError
            jax_error = quoted(exc)
        n_torch, torch_error = torch.cuda.device_count() if torch.cuda.is_available() else 0, ""
        if not n_torch:
            try:
                torch.cuda.init()
            except (AssertionError, RuntimeError) as exc:
                torch_error = quoted(exc)
        return cls(
            n_jax,
            n_torch,
            jax_error,
            torch_error,
            torch.version.cuda or "",
            Path("/proc/driver/nvidia/version").exists(),
            jax.config.values["jax_platforms"] or "",
            os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
        )

    def findings(self) -> list[Finding]:
        value = f"JAX sees {self.jax}, torch sees {self.torch}"
        if self.torch and not self.jax:
            return [Finding("gpus", value, "note" if self.jax_platforms else "problem", self._give_jax())]
        if self.jax and not self.torch:
            return [Finding("gpus", value, "problem", self._give_torch())]
        if self.jax != self.torch:
            remedy = f"Give both the same ones with CUDA_VISIBLE_DEVICES ({self.visible}): torch runs on JAX's ordinal."
            return [Finding("gpus", value, "problem" if self.jax > self.torch else "note", remedy)]
        if self.driver and not self.jax:
            remedy = (
                f"There is an NVIDIA driver. CUDA_VISIBLE_DEVICES is {self.visible}. torch says {self.torch_error}. "
                f"JAX says {self.jax_error}."
            )
            return [Finding("gpus", value, "note", remedy)]
        return [Finding("gpus", value)]

    def _give_jax(self) -> str:
        if self.jax_platforms:
            return f"JAX_PLATFORMS is '{self.jax_platforms}'. For the GPU, unset it or make it 'cuda,cpu'."
        if not self.cuda:
            return "This torch is not built for CUDA, and torchleaf runs on CUDA and the CPU only."
        install = f'`pip install -U "jax[cuda{self.cuda.partition(".")[0]}]"`'
        return (
            f"{install} for the CUDA {self.cuda} that torch has. If that is installed, start JAX before torch "
            "(`jax.devices()` first) and unset LD_LIBRARY_PATH, so that JAX finds its own CUDA libraries. "
            f"JAX says {self.jax_error}."
        )

    def _give_torch(self) -> str:
        if not self.cuda:
            return (
                "This torch is built without CUDA: install a build with it (see pytorch.org), or keep JAX on the CPU "
                "with JAX_PLATFORMS=cpu."
            )
        return f"torch is built for CUDA {self.cuda}, and its driver must be as new. torch says {self.torch_error}."


@dataclass(frozen=True)
class GpuMemory(Check):
    """What JAX leaves of a GPU's memory (bytes; None: not shared), and the variables that say how much it takes."""

    free: int | None
    total: int | None
    environment: Mapping[str, str]

    @classmethod
    def gather(cls) -> "GpuMemory":
        shared = torch.cuda.is_available() and jax.default_backend() == "gpu"
        free, total = torch.cuda.mem_get_info() if shared else (None, None)
        return cls(free, total, {name: v for name, v in os.environ.items() if name.startswith("XLA_")})

    def findings(self) -> list[Finding]:
        if self.free is None or self.total is None:
            return []
        get = self.environment.get
        fraction = get("XLA_CLIENT_MEM_FRACTION") or get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
        takes_all = (
            get("XLA_PYTHON_CLIENT_PREALLOCATE", "") not in ("false", "False", "0")
            and get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() != "platform"
        )
        how = f"JAX takes {float(fraction):.0%} at its start" if takes_all else "JAX takes what it needs"
        value = f"{how}; {self.free / _GIB:.1f} of {self.total / _GIB:.1f} GiB are free"
        remedy = "Set XLA_PYTHON_CLIENT_PREALLOCATE=false, or a smaller XLA_CLIENT_MEM_FRACTION, before JAX starts."
        if self.free < _SCARCE * self.total:
            return [Finding("gpu memory", value, "problem", remedy if takes_all else "Other processes use this GPU.")]
        return [Finding("gpu memory", value, "note", remedy) if takes_all else Finding("gpu memory", value)]


@dataclass(frozen=True)
class Threads(Check):
    """torch's number of threads, the cores this process may use, and the variables that set the number."""

    torch: int
    cores: int
    omp: str
    mkl: str

    @classmethod
    def gather(cls) -> "Threads":
        environment = (os.environ.get(name, "unset") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
        return cls(torch.get_num_threads(), _usable_cores(), *environment)

    def findings(self) -> list[Finding]:
        value = f"torch {self.torch}, cores {self.cores}, OMP_NUM_THREADS {self.omp}, MKL_NUM_THREADS {self.mkl}"
        set_number = f"`torch.set_num_threads({self.cores})`, or OMP_NUM_THREADS={self.cores}"
        if self.torch > self.cores:
            return [Finding("threads", value, "problem", f"More threads than cores wait for each other: {set_number}.")]
        if self.torch == 1 < self.cores:
            return [Finding("threads", value, "note", f"Large torch calls use one core: {set_number}.")]
        return [Finding("threads", value)]


def _usable_cores() -> int:
    """Cores that the process may run on, or fewer where a container (Linux, cgroup 2) limits its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


@dataclass(frozen=True)
class Settings(Check):
    """Settings of JAX's (None: this JAX has no such setting), and torch's default dtype."""

    x64: bool
    torch_default: torch.dtype
    async_dispatch: bool | None

    @classmethod
    def gather(cls) -> "Settings":
        values = jax.config.values
        return cls(values["jax_enable_x64"], torch.get_default_dtype(), values.get("jax_cpu_enable_async_dispatch"))

    def findings(self) -> list[Finding]:
        if self.async_dispatch is None:
            return [self._x64()]
        dispatch = "on" if self.async_dispatch else "off: the program waits for each call on the CPU"
        return [self._x64(), Finding("async dispatch", dispatch)]

    def _x64(self) -> Finding:
        enable = '`jax.config.update("jax_enable_x64", True)`'
        if self.x64:
            return Finding("x64", "on")
        if self.torch_default == torch.float64:
            return Finding("x64", "off, but torch's default dtype is float64: JAX narrows it", "problem", f"{enable}.")
        return Finding("x64", "off: 64-bit dtypes become 32-bit ones", "note", f"For float64 modules: {enable}.")


@dataclass(frozen=True)
class Cache(Check):
    """JAX's persistent compilation cache: its folder (empty: off), the most bytes it may hold, whether it is usable."""

    folder: str
    max_size: int
    writable: bool

    @classmethod
    def gather(cls) -> "Cache":
        values = jax.config.values
        folder = values["jax_compilation_cache_dir"] if values["jax_enable_compilation_cache"] else None
        return cls(folder or "", values["jax_compilation_cache_max_size"], _writable(folder or ""))

    def findings(self) -> list[Finding]:
        if not self.folder:
            return [Finding("compilation cache", "off")]
        if not self.writable:
            remedy = "Name a folder you can write to: jax_compilation_cache_dir."
            return [Finding("compilation cache", f"{self.folder} cannot be written", "problem", remedy)]
        if self.max_size < 0:
            remedy = (
                "A program with torch calls is compiled in each process and leaves an entry each time: "
                "bound the folder with jax_compilation_cache_max_size."
            )
            return [Finding("compilation cache", f"{self.folder}, without a limit", "note", remedy)]
        return [Finding("compilation cache", f"{self.folder}, at most {self.max_size / _GIB:.3g} GiB")]


def _writable(folder: str) -> bool:
    """Whether a folder, or the closest one above it that exists, can be written; an address is taken to be."""
    if "://" in folder:
        return True
    path = Path(folder).absolute()
    closest = next(p for p in (path, *path.parents) if p.exists())
    return closest.is_dir() and os.access(closest, os.W_OK)
