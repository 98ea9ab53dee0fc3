"""The contenders: each module here has `build(case, task) -> Step`. Only the one that is measured is imported."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from cases import Case, Task
from steps import Step


class Contender(NamedTuple):
    """Where a contender's `build` is, with which options, and the distributions it needs."""

    module: str
    options: Mapping[str, str] = MappingProxyType({})
    distributions: tuple[str, ...] = ("torch", "jax", "jaxlib")


BASELINE = "torch"
CONTENDERS = {
    "torch": Contender("torch_eager", distributions=("torch",)),
    "torch.compile": Contender("torch_compile", distributions=("torch",)),
    "torchleaf": Contender("torchleaf", {"residuals": "live"}, ("torchleaf", "torch", "jax", "jaxlib", "jax-tvm-ffi")),
    "torchleaf-recompute": Contender(
        "torchleaf", {"residuals": "recompute"}, ("torchleaf", "torch", "jax", "jaxlib", "jax-tvm-ffi")
    ),
    "torchleaf-xla": Contender("torchleaf", {"engine": "xla"}, ("torchleaf", "torch", "jax", "jaxlib", "jax-tvm-ffi")),
    "wrap-torch2jax": Contender("torch2jax", distributions=("wrap-torch2jax", "torch", "jax", "jaxlib")),
    "torch-jax-interop": Contender("torch_jax_interop", distributions=("torch-jax-interop", "torch", "jax", "jaxlib")),
    "torchax": Contender("torchax", distributions=("torchax", "torch", "jax", "jaxlib")),
    "pure_callback": Contender("pure_callback"),
    "jax": Contender("jax_models"),
}


def load(name: str) -> Callable[[Case, Task], Step]:
    """Import a contender; returns its `build`."""
    contender = CONTENDERS[name]
    return partial(importlib.import_module(f"contenders.{contender.module}").build, **contender.options)
