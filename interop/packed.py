"""`PackedSequence`, what torch's recurrent layers take for sequences of several lengths, as a container of JAX.

Its data and its index tensors are children. `batch_sizes` is static: torch's kernels read its values on the host.
"""

from collections.abc import Iterable
from typing import Any

import jax
import torch
from jax.tree_util import GetAttrKey
from torch._guards import active_fake_mode
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

_CHILDREN = ("data", "sorted_indices", "unsorted_indices")


class BatchSizes(torch.Tensor):
    """A tensor with values among fake ones; the fake mode (`trial.py`) knows it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def of(tensor: torch.Tensor) -> torch.Tensor:
        """A view of a plain tensor."""
        return tensor.as_subclass(BatchSizes)

    def plain(self) -> torch.Tensor:
        """The plain tensor."""
        return self.as_subclass(torch.Tensor)


def register() -> None:
    """Register the class with JAX."""
    jax.tree_util.register_pytree_with_keys(PackedSequence, _flatten, _unflatten)


def _flatten(packed: PackedSequence) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
    return [(GetAttrKey(name), getattr(packed, name)) for name in _CHILDREN], tuple(packed.batch_sizes.tolist())


def _unflatten(batch_sizes: tuple[int, ...], children: Iterable[Any]) -> PackedSequence:
    data, sorted_indices, unsorted_indices = children
    is_trial = active_fake_mode() is not None
    with _disable_current_modes():  # else it would be a fake tensor, without values
        sizes = torch.tensor(batch_sizes, dtype=torch.int64)
        sizes = BatchSizes.of(sizes) if is_trial else sizes
    # Not by the constructor, which computes with the indices: JAX puts anything in their place.
    return tuple.__new__(PackedSequence, (data, sizes, sorted_indices, unsorted_indices))
