"""What torch keeps to itself of its modules."""

from typing import Any

import torch
from torch.jit._recursive import wrap_cpp_module

__all__ = ["wrap_cpp_module"]

_C: Any = torch._C

WrappedHook: Any = torch.nn.modules.module._WrappedHook
"""What a module has in the place of a hook that is given the module: a copy is to hold the copy."""

DropoutNd: Any = torch.nn.modules.dropout._DropoutNd
"""What all dropout layers are."""


def script_attributes(module: Any) -> dict[str, Any]:
    """The declared attributes of a scripted module, which has them in C++."""
    return _C.ConcreteModuleType.from_jit_type(module._c._type()).get_attributes()
