"""What `torch.compile` loads, and what it takes for one step."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def load_compiler() -> None:
    """What `torch.compile` loads when it is first needed."""
    importlib.import_module("torch._dynamo")


def compiler_is_loaded() -> bool:
    """Whether it is there; to load it takes a second."""
    return "torch._dynamo" in sys.modules


def opaque_to_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` takes as one step, its insides seen by autograd and traces only."""
    return importlib.import_module("torch._dynamo").nonstrict_trace(fn)


def run_by_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` runs when it meets it, and whose result, None, it takes for a constant."""
    vars(fn)["_dynamo_marked_constant"] = True
    return fn
