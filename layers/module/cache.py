"""A torch module is taken apart once, however often a framework wraps it, as long as it does not change.

`nnx.bridge.ToLinen`, for one, makes its module anew in each call; its code should be traced and compiled once.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from .unchanged import snapshot, unchanged

Parts = TypeVar("Parts")

_made: "weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, tuple[Any, Any]]]" = weakref.WeakKeyDictionary()


def cached(module: torch.nn.Module, options: Hashable, make: Callable[[], Parts]) -> Parts:
    """What `make` made of `module` with these options before, or makes now. It must not hold the module itself."""
    if not isinstance(module, torch.nn.Module):
        return make()  # which refuses it
    before, made = _made.get(module, {}).get(options, (None, None))
    if made is None or not unchanged(before, snapshot(module)):
        made = make()  # which refuses a module that no snapshot can be taken of
        _made.setdefault(module, {})[options] = (snapshot(module), made)
    return made
