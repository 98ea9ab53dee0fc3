"""Equinox modules, with their `eqx.nn.State` or without, as torch modules."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

from ..equinox_tools import trainable
from .kinds import Kind, takes
from .leaves import Leaves, everywhere


class EquinoxKind(Kind):
    """An Equinox module, which is called with its state, if it has one, and returns a new one with its output."""

    def __init__(self, model: eqx.Module, state: eqx.nn.State | None, axis_name: str | None):
        self.name = type(model).__qualname__
        self._model = Leaves(model, trainable(model))
        self._state = None if state is None else Leaves(state, everywhere(False, state), prefix="state.")
        self._axis_name = axis_name
        self.arrays = {**self._model.arrays, **(self._state.arrays if self._state else {})}
        self.trainable = frozenset(self._model.trainable)
        self.stateful = frozenset(self._state.arrays if self._state else ())
        self.aliases = self._model.aliases
        self._takes_key = takes(type(model).__call__, "key")

    def forget(self) -> None:
        super().forget()
        for leaves in filter(None, (self._model, self._state)):
            leaves.arrays = {}

    def call(
        self, arrays: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        model: Any = eqx.nn.inference_mode(self._model.tree(arrays), not training)
        state = None if self._state is None else self._state.tree(arrays)

        def one(args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> tuple[Any, Any]:
            if self._takes_key:
                kwargs = {"key": key, **kwargs}
            if state is None:
                return model(*args, **kwargs), None
            result = model(*args, state, **kwargs)
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], eqx.nn.State)):
                raise TypeError(
                    f"{self.name} was given a state and returned {type(result).__qualname__}, not (output, state)."
                )
            return result

        if self._axis_name is None:
            out, new = one(args, kwargs, key)
        else:
            out, new = self._of_batch(one, args, kwargs, key)
        return out, {} if self._state is None else self._state.changed(new, arrays)

    def _of_batch(self, one: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> tuple[Any, Any]:
        """The call for each example of a batch, with a key each; the state is that of all."""
        examples, rest = eqx.partition((args, kwargs), lambda x: isinstance(x, jax.Array))
        sizes = {x.shape[0] for x in jax.tree.leaves(examples)}
        if len(sizes) != 1:
            raise ValueError(
                f"{self.name} has axis_name={self._axis_name!r}, so all arrays it is called with need the same leading "
                f"batch axis; they have {sorted(sizes)}."
            )

        def call(examples: Any, key: Any) -> tuple[Any, Any]:
            args, kwargs = eqx.combine(examples, rest)
            return one(args, kwargs, key)

        keys = jax.random.split(key, sizes.pop())
        return jax.vmap(call, out_axes=(0, None), axis_name=self._axis_name)(examples, keys)

    def model(self, arrays: Mapping[str, jax.Array]) -> Any:
        model = self._model.tree(arrays)
        return model if self._state is None else (model, self._state.tree(arrays))
