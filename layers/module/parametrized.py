"""Parametrised modules (`torch.nn.utils.parametrize`): each has a class of its own, made when it was parametrised.

The functions in that class hold the module, and it refuses to be taken apart by `__getstate__`.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .copying import Copier

_MADE_BY = torch.nn.utils.parametrize.__name__


def is_parametrized(cls: type) -> bool:
    """Whether a class was made so."""
    refusal = vars(cls).get("__getstate__")
    return getattr(refusal, "__module__", None) == _MADE_BY


def copy_class(cls: type, copier: "Copier") -> Any:
    """A class like it for a copy of its module."""
    namespace = {
        name: property(*map(copier.if_led, (x.fget, x.fset, x.fdel))) if isinstance(x, property) else copier.if_led(x)
        for name, x in vars(cls).items()
        if name not in ("__dict__", "__weakref__")
    }
    return type(cls)(cls.__name__, cls.__bases__, namespace)
