"""torch's dispatch modes and fake tensors, and sizes that are not known."""

import importlib
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "UnsupportedFakeTensorException",
    "without_modes",
]

_C: Any = torch._C


def new_size(env: Any, name: str, example: int, lowest: int, highest: int | None) -> tuple[str, torch.SymInt]:
    """A size of torch's that is not known, with an example of it and bounds; and the name of its symbol."""
    source = importlib.import_module("torch._dynamo.source").ConstantSource(name)
    dynamic = importlib.import_module("torch.fx.experimental.symbolic_shapes").DimDynamic.DYNAMIC
    ranges = importlib.import_module("torch.utils._sympy.value_ranges").ValueRanges
    infinity = importlib.import_module("torch.utils._sympy.numbers").int_oo
    symbol = env.create_symbol(example, source, dynamic_dim=dynamic, do_not_specialize_zero_one=True)
    env.var_to_range[symbol] = ranges(lowest, infinity if highest is None else highest)
    return symbol.name, env.create_symintnode(symbol, hint=example)


def has_dispatch_modes() -> bool:
    """Whether ops are looked at by a mode: a trace, fake tensors, a recording."""
    return _C._len_torch_dispatch_stack() > 0


FAKE_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
"""Where fake tensors say what they cannot do."""
