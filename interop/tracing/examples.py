"""Example values to run a torch callable on: arguments that are there, or made ones of several kinds.

Shapes hardly ever depend on values, but code may refuse some: so there are positive numbers below one (probabilities,
variances), numbers of either sign, matrices that can be factorised, numbers in order; indices that are in range
anywhere, and lengths that are not zero. They are the same each time, and no generator moves for them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_MOST_DRAWN = 2**22
"""Elements of a tensor up to which they differ from each other: more take long to draw."""

Maker = Callable[[tuple[int, ...], int], torch.Tensor]
"""Makes the floats of a shape for an operand of this number: no two are the same."""


@dataclass(frozen=True)
class Example:
    """Operands to run a callable on."""

    operands: Callable[[], list[torch.Tensor]]
    """Makes them; the run may write into them."""
    is_given: bool
    """Whether they are a user's arguments."""


def made_examples(
    specs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    known: Sequence[Callable[[], torch.Tensor] | None],
    n_weights: int,
) -> Iterator[Example]:
    """Examples of these shapes and dtypes, with the values of operands that are known: their makers.

    The first `n_weights` are weights, which keep the scale of what passes through.
    """
    for floats, integer, boolean in _KINDS:

        def operands(floats: Maker = floats, integer: int = integer, boolean: bool = boolean) -> list[torch.Tensor]:
            return [
                _made(*spec, i, floats, integer, boolean, is_weight=i < n_weights) if make is None else make()
                for i, (spec, make) in enumerate(zip(specs, known, strict=True))
            ]

        yield Example(operands, is_given=False)


def _made(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    number: int,
    floats: Maker,
    integer: int,
    boolean: bool,
    *,
    is_weight: bool,
) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.full(shape, boolean)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.full(shape, integer, dtype=dtype)
    values = floats(shape, number) if math.prod(shape) <= _MOST_DRAWN else torch.full(shape, 0.5)
    if is_weight and len(shape) > 1:
        values = values / math.sqrt(max(1, math.prod(shape[1:])))
    return values.to(dtype)


def _uniform(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((0, number)).uniform(0.1, 0.9, shape).astype(np.float32))


def _normal(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((1, number)).normal(size=shape).astype(np.float32))


def _definite(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Symmetric matrices with large diagonals, where they are square."""
    values = _uniform(shape, number)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return values
    return (values + values.mT) / 2 + shape[-1] * torch.eye(shape[-1])


def _rising(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Each number larger than the one before: times, edges of bins."""
    values = np.linspace(0.1, 0.9, math.prod(shape)) * (1 + number / 100)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def _ones(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.ones(shape)


def _zeros(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.zeros(shape)


_KINDS: tuple[tuple[Maker, int, bool], ...] = (
    (_normal, 0, False),
    (_uniform, 1, True),
    (_definite, 0, True),
    (_rising, 1, True),
    (_ones, 1, False),
    (_zeros, 0, False),
)
