"""Numbers of both sides compared, and numbers drawn to compare by."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SINGLE, DOUBLE, HALF = 5e-4, 2e-5, 5e-2
"""Tolerances: of float32 against torch, of float64 against finite differences, of dtypes narrower than float32."""


class WrongError(Exception):
    """Numbers that are not torch's."""


class NotAskedError(Exception):
    """Something that there is not, or that torch cannot do itself."""


def compare(
    actual: Sequence[Any],
    expected: Sequence[np.ndarray],
    what: str,
    tolerance: float = SINGLE,
    *,
    names: Sequence[str] = (),
    least: float = 0.0,
) -> float:
    """The largest error, relative to the largest element of its array or a hundredth of the largest of all.

    `least` is a size that errors are relative to if all arrays are smaller. `WrongError` beyond the tolerance.
    """
    if len(actual) != len(expected):
        raise WrongError(f"{what}: {len(actual)} arrays where torch has {len(expected)}")
    largest = 0.0
    least = max(least, 1e-2 * max((np.abs(e[np.isfinite(e)]).max(initial=0) for e in expected), default=0))
    for i, (a, e) in enumerate(zip(numpy_of(actual), expected, strict=True)):
        where = f"{what}: {names[i] if i < len(names) else f'array {i}'}"
        if a.shape != e.shape:
            raise WrongError(f"{where} has shape {a.shape}, torch's {e.shape}")
        if not np.array_equal(np.isfinite(a), np.isfinite(e)):
            raise WrongError(f"{where} is not finite where torch's is, or is where torch's is not")
        finite = np.isfinite(e)
        off = np.where(finite, np.abs(np.where(finite, a, 0).astype(e.dtype) - np.where(finite, e, 0)), 0)
        error = float(off.max(initial=0) / (1e-6 + max(least, np.abs(e[finite]).max(initial=0))))
        if not error <= tolerance:
            raise WrongError(f"{where} is off by {error:.1e}{_place(a, e, off)}")
        largest = max(largest, error)
    return largest


def _place(actual: np.ndarray, expected: np.ndarray, off: np.ndarray) -> str:
    """The element that is off most."""
    index = np.unravel_index(int(np.argmax(off)), off.shape)
    at = f" at [{', '.join(map(str, index))}]" if index else ""
    return f"{at}: {actual[index]:.6g}, torch has {expected[index]:.6g}"


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """A copy; of dtypes that NumPy does not have, in float32."""
    x = x.detach().resolve_conj().resolve_neg().cpu()
    return (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy().copy()


def numpy_of(arrays: Sequence[Any]) -> list[np.ndarray]:
    """Copies of JAX's arrays."""
    return [np.array(x, dtype=np.float32 if x.dtype.kind in "fV" and x.dtype.itemsize < 4 else None) for x in arrays]


def numpy_of_tensors(tensors: Any) -> list[np.ndarray]:
    """Copies of torch's."""
    return [to_numpy(x) for x in tensors]


def weights_of(size: int) -> np.ndarray:
    """Weights that differ from each other and favour no direction."""
    return np.cos(1 + math.sqrt(2) * np.arange(size))


def normal(rng: np.random.Generator, like: Any) -> np.ndarray:
    """Normal numbers of a shape and dtype, in both parts if it is complex."""
    drawn = rng.normal(size=like.shape)
    is_complex = np.issubdtype(like.dtype, np.complexfloating)
    return (drawn + 1j * rng.normal(size=like.shape) if is_complex else drawn).astype(like.dtype)


def size_of(arrays: Sequence[np.ndarray]) -> float:
    """The norm of all of them together: how large their product with a normal direction is, about."""
    return math.sqrt(sum(float((np.abs(x) ** 2).sum()) for x in arrays))
