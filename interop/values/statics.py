"""Static values, which are no arrays, as parts of keys."""

from typing import Any

import torch


def static_key(leaf: Any) -> Any:
    """A key that tells apart what `==` does not: 1, 1.0 and True; 0.0 and -0.0."""
    if isinstance(leaf, torch.Tensor):
        raise TypeError("a torch.Tensor is neither a JAX array nor static")
    return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)
