"""Installed versions, and the ranges that torchleaf's own metadata promise."""

import operator
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .report import Check, Finding

_PACKAGES = ("torchleaf", "jax", "jaxlib", "torch", "equinox", "jaxtyping", "numpy", "jax-tvm-ffi", "flax")
_OPTIONAL = {
    "jax-tvm-ffi": "Torch calls cost more without it, see 'torch calls' below.",
    "flax": "Only Flax modules need it: `pip install flax`.",
}
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Versions(Check):
    """Versions by package (None: not installed), and the ranges asked for, such as `>=0.10,<0.12`."""

    installed: Mapping[str, str | None]
    ranges: Mapping[str, str]

    @classmethod
    def gather(cls) -> "Versions":
        installed = {name: _version(name) for name in _PACKAGES}
        ranges = {} if installed["torchleaf"] is None else _ranges()
        return cls({"python": platform.python_version(), **installed}, ranges)

    def findings(self) -> list[Finding]:
        return [self._finding(name, version) for name, version in self.installed.items()]

    def _finding(self, name: str, version: str | None) -> Finding:
        asked = self.ranges.get(name, "")
        remedy = f"Use a Python {asked}." if name == "python" else f'`pip install -U "{name}{asked}"`'
        if version is None and name == "torchleaf":
            return Finding(name, "imported, not installed", "note", "Version ranges are not checked: `pip install .`.")
        if version is None and name in _OPTIONAL:
            return Finding(name, "not installed", "note", _OPTIONAL[name])
        if version is None:
            return Finding(name, "not installed", "broken", remedy)
        if not within(version, asked, above=True):
            return Finding(name, f"{version}, but torchleaf needs {asked}", "broken", remedy)
        if not within(version, asked):
            remedy = f"If something goes wrong, report it, and take one that was tried: {remedy}"
            return Finding(name, f"{version}, newer than what torchleaf was tried with ({asked})", "note", remedy)
        return Finding(name, f"{version} ({asked})" if asked else version)


def within(version: str, asked: str, *, above: bool = False) -> bool:
    """Whether a version is in a range, or (`above`) in it or above it.

    Only release numbers count: 2.13.0+cpu is 2.13, and so is 2.13.0rc1.
    """
    parts = [part for part in re.findall(r"([<>=!~]+)\s*([\d.]+)", asked) if not (above and "<" in part[0])]
    return all(_OPERATORS[compare](_release(version), _release(bound)) for compare, bound in parts)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at the end."""
    numbers = [int(n) for n in re.findall(r"\d+(?:\.\d+)*", version)[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ranges() -> dict[str, str]:
    """What is asked for without extras, and Flax. An environment marker says where a package exists at all."""
    every = metadata.requires("torchleaf") or ()
    required = [r.partition(";")[0] for r in every if "extra ==" not in r or re.search("extra == .flax.", r)]
    names = [re.split(r"[^\w.-]", r)[0] for r in required]
    ranges = {name: r.removeprefix(name).strip() for name, r in zip(names, required, strict=True)}
    return {"python": metadata.metadata("torchleaf")["Requires-Python"], **ranges}
