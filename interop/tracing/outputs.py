"""The output of a torch callable as a pytree of avals: what it returned, or what the caller declares."""

from collections.abc import Sequence
from typing import Any

import jax
import torch

from ..errors import TorchCallError
from ..types import Aval
from ..values import dtypes
from ..values.names import leaf_names
from ..values.trees import flatten_registering

_STATIC = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def describe(output: Any, name: str) -> tuple[Any, tuple[Any, ...]]:
    """The output's pytree, and its leaves with an aval in the place of each tensor."""
    leaves, treedef = flatten_registering(output, every_record=True)
    described: list[Any] = []
    for leaf, path in zip(leaves, leaf_names(output), strict=True):
        if isinstance(leaf, torch.Tensor):
            if leaf.layout != torch.strided or leaf.is_quantized:
                raise TorchCallError(
                    f"{name} returns a tensor of layout {leaf.layout} at output{path}; JAX has dense arrays only. "
                    "Return `.to_dense()`."
                )
            described.append(Aval(tuple(leaf.shape), dtypes.canonical(leaf.dtype)))
        elif isinstance(leaf, _STATIC):
            described.append(leaf)
        else:
            raise TorchCallError(
                f"{name} returns a {type(leaf).__module__}.{type(leaf).__qualname__} at output{path}: neither a "
                "tensor, nor a pytree of tensors, nor a static value (None, bool, number, str, dtype). Return its "
                "tensors, or register its class with jax.tree_util.register_pytree_node."
            )
    return treedef, tuple(described)


def declared(out_shape: Any) -> tuple[Any, tuple[Any, ...]]:
    """The caller's `out_shape` as tree and leaves."""
    leaves, treedef = flatten_registering(out_shape)
    for leaf in leaves:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"out_shape has a {type(leaf).__name__} leaf ({leaf!r}); give a pytree of jax.ShapeDtypeStruct."
            )
    return treedef, tuple(Aval(tuple(x.shape), jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves)


def compare(expected: tuple[Any, Any], found: tuple[Any, Any], name: str) -> None:
    """Raise where the caller's `out_shape` contradicts what was found."""
    if expected != found:
        raise TorchCallError(
            f"{name}: out_shape says {render(*expected)}, but the torch callable returns {render(*found)}. "
            "Correct out_shape, or leave it out: these shapes can be inferred."
        )


def render(treedef: Any, leaves: Sequence[Any]) -> str:
    """An output as text."""

    def short(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Aval) else repr(leaf)

    return str(jax.tree.unflatten(treedef, [short(leaf) for leaf in leaves]))
