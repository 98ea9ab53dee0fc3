"""Which CUDA libraries the process has loaded, for `doctor`: both frameworks bring theirs, and the first to load wins.

Source: JAX issues [18032](https://github.com/jax-ml/jax/issues/18032),
[19004](https://github.com/jax-ml/jax/issues/19004).
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .report import Check, Finding

_LIBRARIES = {"cuDNN": "libcudnn.so", "NCCL": "libnccl.so", "cuBLAS": "libcublas.so", "CUDA runtime": "libcudart.so"}


@dataclass(frozen=True)
class CudaLibraries(Check):
    """The versions of cuDNN and NCCL that torch finds (empty: no CUDA), and the files loaded of each library."""

    cudnn: str
    nccl: str
    loaded: Mapping[str, Sequence[str]]

    @classmethod
    def gather(cls) -> "CudaLibraries":
        if not torch.cuda.is_available():
            return cls("", "", {})
        version, nccl = torch.backends.cudnn.version() or 0, ""
        cudnn = f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else ""
        if torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
        return cls(cudnn, nccl, _loaded(Path("/proc/self/maps")))

    def findings(self) -> list[Finding]:
        if not self.cudnn:
            return []
        value = f"cuDNN {self.cudnn}" + (f", NCCL {self.nccl}" if self.nccl else "")
        twice = {name: files for name, files in self.loaded.items() if len(files) > 1}
        if not twice:
            return [Finding("cuda libraries", f"{value}, for both frameworks")]
        files = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in twice.items())
        remedy = (
            f"Two copies are loaded ({files}). If one framework fails to start or to find an algorithm, install both "
            "for the same CUDA from wheels into one environment, and unset LD_LIBRARY_PATH."
        )
        return [Finding("cuda libraries", value, "note", remedy)]


def _loaded(maps: Path) -> dict[str, list[str]]:
    """The files of each library in the memory map of a process."""
    if not maps.exists():
        return {}
    paths = sorted({line.split()[-1] for line in maps.read_text().splitlines() if "/" in line})
    found = {name: [p for p in paths if Path(p).name.startswith(file)] for name, file in _LIBRARIES.items()}
    return {name: files for name, files in found.items() if files}
