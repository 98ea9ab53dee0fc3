"""`PackedSequence`, what torch's recurrent layers take for sequences of several lengths, as a container of JAX.

Its data and its index tensors are children. `batch_sizes` is static: torch's kernels read its values on the host.
"""

from collections.abc import Iterable
from typing import Any

import jax
import torch
from jax.tree_util import GetAttrKey
from torch.nn.utils.rnn import PackedSequence

from ..internals.fake import without_modes

_CHILDREN = ("data", "sorted_indices", "unsorted_indices")


def register() -> None:
    """Register the class with JAX."""
    jax.tree_util.register_pytree_with_keys(PackedSequence, _flatten, _unflatten)


def _flatten(packed: PackedSequence) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
    return [(GetAttrKey(name), getattr(packed, name)) for name in _CHILDREN], tuple(packed.batch_sizes.tolist())


def _unflatten(batch_sizes: tuple[int, ...], children: Iterable[Any]) -> PackedSequence:
    data, sorted_indices, unsorted_indices = children
    with without_modes():  # a constant for every mode
        sizes = torch.tensor(batch_sizes, dtype=torch.int64)
    # Not by the constructor, which computes with the indices: JAX puts anything in their place.
    return tuple.__new__(PackedSequence, (data, sizes, sorted_indices, unsorted_indices))
