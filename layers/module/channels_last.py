"""Channels last: Flax's layout of images outside, torch's inside, by views.

A contiguous array of shape [batch, ..., channels] moved to [batch, channels, ...] is what torch calls channels_last:
its convolutions run on it as it is, and what they return moves back to a contiguous array.

Source: [channels last memory format](https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html).
"""

from typing import Any

import jax
import torch

from ...interop.values.trees import flatten_registering


def to_torch_layout(tree: Any) -> Any:
    """Channels from the last axis to the second, in every floating tensor of three axes or more."""
    return _move(tree, -1, 1)


def to_flax_layout(tree: Any) -> Any:
    """Channels from the second axis to the last."""
    return _move(tree, 1, -1)


def _move(tree: Any, source: int, destination: int) -> Any:
    leaves, treedef = flatten_registering(tree, every_record=True)
    moved = [x.movedim(source, destination) if _has_channels(x) else x for x in leaves]
    return jax.tree.unflatten(treedef, moved)


def _has_channels(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim >= 3 and (leaf.is_floating_point() or leaf.is_complex())
