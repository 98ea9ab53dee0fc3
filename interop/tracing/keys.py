"""A torch callable with one more operand: the key that its random numbers are drawn from."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..modes.host_random import host_generators_kept, host_generators_seeded
from ..modes.kernels import plain_kernels
from ..modes.random import WithKey
from .traceable import Flat


def with_key(run: Flat, *, kernels: frozenset[str], host: bool = False) -> Flat:
    """`run` without `kernels`, its last operand the key.

    Random ops draw from it, and, where `run` draws from the `host`, Python's and NumPy's generators.
    """

    def keyed(*tensors: torch.Tensor) -> Any:
        with plain_kernels(kernels), WithKey(tensors[-1]) as mode, _seeded(mode.words) if host else _NO_CHANGE:
            return run(*tensors[:-1])

    return keyed


def _seeded(words: Sequence[Sequence[int]] | None) -> contextlib.AbstractContextManager[None]:
    """Python's and NumPy's generators seeded by the words of keys; a trace, which has none, leaves them alone."""
    return host_generators_kept() if words is None else host_generators_seeded([word for row in words for word in row])


_NO_CHANGE = contextlib.nullcontext()
