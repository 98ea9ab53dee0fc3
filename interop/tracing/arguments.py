"""The arguments of one call: arrays become flat operands, everything else is static."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..types import Aval
from ..values import dtypes
from ..values.arrays import check_range
from ..values.statics import static_key
from ..values.trees import flatten_registering
from .signature import Signature

Filler = Callable[[Sequence[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


class Arguments:
    """`(args, kwargs)` of a call, taken apart.

    `leading` are arrays, by name, that precede them: the weights of a module.
    `operands` are the array leaves as JAX arrays or tracers, `avals` theirs; `key` identifies all that is static.
    Raises a `TypeError` that names the argument for leaves that can be neither.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        signature: Signature,
        leading: Mapping[str, Any] | None = None,
    ):
        self._leading = leading or {}
        self.n_leading = len(self._leading)
        leaves, self._treedef = flatten_registering((args, kwargs))
        self._is_array = tuple(map(_is_array, leaves))
        self.signature, self._args, self._kwargs = signature, args, kwargs
        try:
            self._statics = tuple(None if arr else x for x, arr in zip(leaves, self._is_array, strict=True))
            arrays = [x for x, arr in zip(leaves, self._is_array, strict=True) if arr]
            self.operands = [_operand(x) for x in (*self._leading.values(), *arrays)]
            self.avals = tuple(_aval(x) for x in self.operands)
            self.key = (self._treedef, self._is_array, tuple(map(static_key, self._statics)), self.avals)
            hash(self.key)
        except (TypeError, OverflowError):
            self._reject(leaves)
            raise

    def names(self) -> list[str]:
        """The operands as the user wrote them: `x`, `targets['label']`."""
        names = self.signature.leaf_names(self._args, self._kwargs)
        return [*self._leading, *(n for n, arr in zip(names, self._is_array, strict=True) if arr)]

    def check_signature(self) -> None:
        """`TypeError` naming an argument that is missing or unknown."""
        self.signature.check(self._args, self._kwargs)

    def filler(self) -> Filler:
        """A function from tensors, for the operands that are not leading, to `(args, kwargs)`; it holds no array."""
        treedef, is_array, statics = self._treedef, self._is_array, self._statics

        def fill(tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            feed = iter(tensors)
            leaves = [next(feed) if arr else static for static, arr in zip(statics, is_array, strict=True)]
            return jax.tree.unflatten(treedef, leaves)

        return fill

    def _reject(self, leaves: Sequence[Any]) -> None:
        """Raise for the first leaf that cannot be passed, by name."""
        names = [*self._leading, *self.signature.leaf_names(self._args, self._kwargs)]
        is_array = (*(True for _ in self._leading), *self._is_array)
        for name, leaf, arr in zip(names, (*self._leading.values(), *leaves), is_array, strict=True):
            where = f"{self.signature.name}: argument {name}"
            if isinstance(leaf, torch.Tensor):
                raise TypeError(
                    f"{where} is a torch.Tensor of shape {tuple(leaf.shape)}; torchleaf functions take JAX arrays. "
                    "Convert it with torchleaf.to_jax(tensor)."
                ) from None
            if not arr and type(leaf).__hash__ is None:
                raise TypeError(
                    f"{where} is a {type(leaf).__name__}, neither an array nor hashable, so it cannot be static. Pass "
                    "arrays, pytrees of arrays, or hashable values."
                ) from None
            if arr:
                try:
                    _aval(_operand(leaf))
                except (TypeError, OverflowError) as exc:
                    raise type(exc)(f"{where}: {exc}") from None


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return dtypes.has_torch_dtype(leaf.dtype)
    return isinstance(leaf, jax.Array)


def _operand(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    values = np.asarray(leaf)
    wanted = jax.dtypes.canonicalize_dtype(values.dtype)
    if values.dtype != wanted and values.dtype.kind in "iu" and values.size:
        check_range(values, wanted, "the array")
    return jnp.asarray(values)


def _aval(operand: Any) -> Aval:
    dtypes.to_torch_dtype(operand.dtype)  # raises where torch has none
    return Aval(operand.shape, operand.dtype)
