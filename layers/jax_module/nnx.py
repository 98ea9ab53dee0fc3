"""Flax NNX modules as torch modules."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from flax import nnx

from .kinds import Kind
from .leaves import Leaves, everywhere


class NNXKind(Kind):
    """An NNX module: each `nnx.Param` is a parameter, other variables are buffers, which a call may change.

    Its random streams have no state of their own here: their keys come of the call's.
    """

    def __init__(self, module: nnx.Module):
        self.name = type(module).__qualname__
        self._graphdef, params, streams, others = nnx.split(module, nnx.Param, nnx.RngState, ...)
        self._params = Leaves(_pure(params), jax.tree.map(eqx.is_inexact_array, _pure(params)))
        self._others = Leaves(_pure(others), everywhere(False, _pure(others)))
        self._states = params, streams, others
        self.arrays = {**self._params.arrays, **self._others.arrays}
        self.aliases = {**self._params.aliases, **self._others.aliases}
        self.trainable = frozenset(self._params.trainable)
        self.stateful = frozenset(self._others.arrays)
        self._is_key = jax.tree.map(lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key), _pure(streams))
        self._streams = _pure(streams)

    def forget(self) -> None:
        super().forget()
        self._params.arrays = self._others.arrays = {}
        params, streams, others = self._states
        self._states = _shapes(params), streams, _shapes(others)

    def call(
        self, arrays: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        module: Any = self._merged(arrays, self._drawn(key))
        module.train() if training else module.eval()
        out = module(*args, **kwargs)
        _, _, _, others = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return out, self._others.changed(_pure(others), arrays)

    def _drawn(self, key: Any) -> Any:
        """The streams as they are with a new key: each has its own, and starts to count."""
        leaves, treedef = jax.tree.flatten(self._streams)
        flags = jax.tree.leaves(self._is_key)
        drawn = [
            jax.random.fold_in(key, i) if is_key else jax.numpy.zeros_like(leaf)
            for i, (leaf, is_key) in enumerate(zip(leaves, flags, strict=True))
        ]
        return jax.tree.unflatten(treedef, drawn)

    def _merged(self, arrays: Mapping[str, Any], streams: Any) -> nnx.Module:
        pure = self._params.tree(arrays), streams, self._others.tree(arrays)
        states = [_with_values(state, values) for state, values in zip(self._states, pure, strict=True)]
        return nnx.merge(self._graphdef, *states)

    def model(self, arrays: Mapping[str, jax.Array]) -> Any:
        return self._merged(arrays, self._streams)


def _shapes(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _pure(state: Any) -> Any:
    return nnx.to_pure_dict(state)


def _with_values(state: Any, values: Any) -> Any:
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, values)
    return state
