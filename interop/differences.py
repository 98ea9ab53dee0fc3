"""Finite differences: the derivative that needs nothing of torch but the function itself, to a few digits."""

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, ...]


def central_difference(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    """`J t` from two values of the function."""
    step = _step(xs, tangents)
    ahead, behind = (function(*(x + s * t for x, t in zip(xs, tangents, strict=True))) for s in (step, -step))
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


def _step(xs: Tensors, tangents: Tensors) -> float:
    """Where the errors of rounding and of the difference are about as large."""
    precision = max(torch.finfo(x.dtype).eps for x in xs)
    size, length = (max((float(v.abs().max()) for v in vs if v.numel()), default=0.0) for vs in (xs, tangents))
    return precision ** (1 / 3) * max(size, 1.0) / (length or 1.0)
