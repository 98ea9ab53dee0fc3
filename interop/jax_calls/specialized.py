"""A JAX function at one signature: the call that computes it, and how its outputs are put together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch

from ..values import dtypes
from ..values.trees import flatten_registering, leaf_names
from .arguments import Arguments
from .bind import bind
from .call import JaxCall, aval_of


class Specialized:
    """A function for arguments of one structure, whose static leaves are part of it."""

    def __init__(self, name: str, fn: Callable[..., Any], arguments: Arguments):
        arguments.check()
        self._name, self._fn = name, fn
        self._statics, self._treedef = list(arguments.leaves), arguments.treedef
        self._places, self._key_impls = arguments.places, arguments.key_impls
        for i in self._places:
            self._statics[i] = None  # values belong to a call
        avals = [
            aval_of(shape, dtypes.canonical(x.dtype))
            for shape, x in zip(arguments.shapes, arguments.operands, strict=True)
        ]
        self._call = JaxCall(self._flat, avals, name)
        self._widened = {i for i, a in enumerate(self._call.out_avals) if _torch_dtype(a) != _same_dtype(a)}

    def _flat(self, *arrays: Any) -> list[Any]:
        leaves = list(self._statics)
        for i, array in zip(self._places, arrays, strict=True):
            impl = self._key_impls.get(i)
            leaves[i] = array if impl is None else jax.random.wrap_key_data(array, impl=impl)
        args, kwargs = jax.tree.unflatten(self._treedef, leaves)
        out = self._fn(*args, **kwargs)
        outs, self._out_treedef = flatten_registering(out)
        for i, y in enumerate(outs):
            if not isinstance(y, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                raise TypeError(
                    f"output{leaf_names(out)[i]} of {self._name} is {y!r} of type {type(y).__qualname__}, which is no "
                    "array. Return arrays, numbers and None, in any pytree."
                )
        return [jax.numpy.asarray(y) for y in outs]

    def __call__(self, operands: Sequence[torch.Tensor]) -> Any:
        outs = bind(self._call, *operands)
        if self._widened:
            outs = [
                y.to(_torch_dtype(self._call.out_avals[i])) if i in self._widened else y for i, y in enumerate(outs)
            ]
        return jax.tree.unflatten(self._out_treedef, outs)


def _same_dtype(aval: Any) -> torch.dtype:
    return dtypes.to_torch_dtype(aval.dtype)


def _torch_dtype(aval: Any) -> torch.dtype:
    """What torch gets: without x64, JAX's default integer stands for torch's."""
    return dtypes.operand_dtype(aval.dtype)
