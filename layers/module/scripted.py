"""TorchScript parts of a module: how they are copied, and where in them weights are.

Their attributes lie in C++, which hands them out and takes others, as long as types fit. Their code is shared.
"""

from typing import TYPE_CHECKING, Any

import torch

from ...interop.internals.modules import script_attributes, wrap_cpp_module
from ...interop.internals.ops import torch_pytree

if TYPE_CHECKING:
    from .copying import Copier


def holds_code(module: torch.nn.Module) -> bool:
    """Whether parts of a module are code, compiled or generated, that a `__getstate__` may compile anew (e3nn's)."""
    if type(module).__getstate__ is torch.nn.Module.__getstate__:
        return False
    return any(isinstance(child, torch.jit.ScriptModule | torch.fx.GraphModule) for child in module.children())


class ScriptSlots:
    """The attributes of a scripted module, as a dict has them."""

    def __init__(self, module: Any):
        self._module, self.get, self._set = module, module._c.getattr, module._c.setattr

    def __setitem__(self, name: str, value: Any) -> None:
        self._set(name, value)

    def unregistered(self) -> dict[str, Any]:
        """Those that are neither parameters nor buffers."""
        registered = {*self._module._parameters.keys(), *self._module._buffers.keys()}
        declared = script_attributes(self._module)
        return {name: self.get(name) for name in declared if name not in registered}

    def items(self) -> dict[str, Any]:
        """All of them."""
        return {**dict([*self._module._parameters.items(), *self._module._buffers.items()]), **self.unregistered()}


def copy_scripted(module: Any, copier: "Copier") -> Any:
    """A copy that shares the code, its tensors replaced as in the rest."""
    made = wrap_cpp_module(_copy_state(module._c))
    for part, made_part in zip(module.modules(), made.modules(), strict=True):
        copier.memo[id(part)] = made_part
        getattr(made_part, "forward", None)  # it caches its methods, which is no change of state
        slots, present = ScriptSlots(made_part), ScriptSlots(part).items()
        copier.keep(present)
        for name, value in present.items():
            if isinstance(value, torch.Tensor):
                slots[name] = copier.copy(value)
            elif any(map(copier.leads_to_module, torch_pytree.tree_leaves(value))):
                raise TypeError(f"the TorchScript attribute `{name}` holds weights in a {type(value).__name__}")
        for name, value in vars(part).items():
            if name.endswith("_hooks") and value:
                vars(made_part)[name] = copier.copy(value)
    return made


def _copy_state(state: Any) -> Any:
    try:
        return state.__deepcopy__({})
    except RuntimeError:  # it holds objects of C++ that cannot be copied: they are shared
        return state._clone() if hasattr(state, "_clone") else state.__copy__()
