"""A JAX function at one signature: the call that computes it, and how its outputs are put together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.interpreters import partial_eval

from ..values import dtypes
from ..values.names import leaf_names
from ..values.trees import flatten_registering
from .arguments import Arguments
from .bind import bind
from .call import JaxCall, aval_of
from .errors import failure
from .keys import as_key, drawn_key, key_aval


class Specialized:
    """A function for arguments of one structure, whose static leaves are part of it."""

    def __init__(self, name: str, fn: Callable[..., Any], arguments: Arguments, may_draw: bool):
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
        self._may_draw, self.draws = may_draw, False
        if may_draw:
            self.draws = self._makes_use_of_key(avals)
        self._call = JaxCall(self._flat, [*avals, key_aval()] if self.draws else avals, name)
        self._widened = {i for i, a in enumerate(self._call.out_avals) if _torch_dtype(a) != _same_dtype(a)}

    def _makes_use_of_key(self, avals: Sequence[Any]) -> bool:
        """Whether the function computes with the key that it takes: most layers of Equinox take one and do not."""
        avals = [*avals, key_aval()]
        try:
            self.draws = True
            jaxpr = jax.make_jaxpr(self._flat)(*avals)
        except Exception as exc:
            raise failure(self._name, avals[:-1], exc) from exc
        return partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[1][-1]

    def _flat(self, *arrays: Any) -> list[Any]:
        leaves = list(self._statics)
        for i, array in zip(self._places, arrays, strict=False):
            impl = self._key_impls.get(i)
            leaves[i] = array if impl is None else jax.random.wrap_key_data(array, impl=impl)
        args, kwargs = jax.tree.unflatten(self._treedef, leaves)
        if self._may_draw:
            kwargs["key"] = as_key(arrays[-1]) if self.draws else jax.random.key(0)
        out = self._fn(*args, **kwargs)
        outs, self._out_treedef = flatten_registering(out)
        for i, y in enumerate(outs):
            if not isinstance(y, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                raise TypeError(
                    f"output{leaf_names(out)[i]} of {self._name} is {y!r} of type {type(y).__qualname__}, which is no "
                    "array. Return arrays, numbers and None, in any pytree."
                )
        return [jax.numpy.asarray(y) for y in outs]

    def __call__(self, operands: Sequence[torch.Tensor], generator: torch.Generator | None) -> Any:
        """The outputs, with numbers from a generator if the function draws any."""
        if self.draws:
            device = operands[0].device if operands else torch.device("cpu")
            operands = [*operands, drawn_key(generator, device)]
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
