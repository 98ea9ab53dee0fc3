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
    size, length = (max((float(v.detach().abs().max()) for v in vs if v.numel()), default=0.0) for vs in (xs, tangents))
    return precision ** (1 / 3) * max(size, 1.0) / (length or 1.0)


class OtherDerivativeError(Exception):
    """Something is not the derivative that it should be."""


def check_slope(
    function: Callable[..., Tensors], xs: Tensors, tangents: Tensors, weights: Tensors, slope: float
) -> None:
    """`OtherDerivativeError` where `slope` is not that of `<weights, function>`, on which finite differences settle."""
    precision = max(torch.finfo(x.dtype).eps for x in xs)
    step = _step(xs, tangents) * precision ** (1 / 5 - 1 / 3)  # of differences of fourth order

    def difference(step: float) -> float:
        points = (tuple(x + s * t for x, t in zip(xs, tangents, strict=True)) for s in (step, -step))
        ahead, behind = (inner(weights, function(*point)) for point in points)
        return (ahead - behind) / (2 * step)

    with torch.no_grad():
        widest, wide, near = (difference(h) for h in (2 * step, step, step / 2))
    before, settled = (4 * wide - widest) / 3, (4 * near - wide) / 3
    if abs(settled - slope) > max(5 * abs(settled - before), _CLEAR * abs(settled), _CLEAR * abs(slope)):
        raise OtherDerivativeError


_CLEAR = 3e-2


def inner(a: Tensors, b: Tensors) -> float:
    """The sum of products, or its real part."""
    products = ((x.detach() * y.detach()).sum() for x, y in zip(a, b, strict=True))
    return sum(float(p.real) for p in products)


def drawn_like(tensors: Tensors, seed: int = 2) -> Tensors:
    """Normal numbers, the same ones each time."""
    generator = torch.Generator(tensors[0].device).manual_seed(seed) if tensors else None
    return tuple(torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in tensors)
