"""A torch module as a Flax Linen module, for checks."""

from collections.abc import Iterable
from typing import Any

import jax
import torch

from ...interop.function import TorchFunction
from ..linen import TorchModule
from ..module.weights import held, to_torch_module
from .kinds import Kind, widened_options
from .wrapped import Arrays, Wrapped

_STATE = ("batch_stats", "buffers")


class LinenWrapped(Wrapped):
    """A Linen module, its variables as `init` makes them; the collections with buffers are mutable if they change."""

    def __init__(
        self, like: TorchModule, module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool
    ):
        mode = {"train": module.training, "deterministic": None}
        options = widened_options(like.made.module.options, double=double)
        new = {"module": module, "made": None, "initializer": None, "out_shape": options.out_shape}
        self.model = like.clone(parent=None, **new, **mode)
        self.model.made.module.stand_alone()
        key = jax.random.key(0)
        self._variables = self.model.init({"params": key, self.model.rng_collection: key}, *args)
        state = {name: self._variables[name] for name in _STATE if name in self._variables}
        self._state = state if stateful else None
        weights, specs = held(self.model, self._variables).weights, self.model.made.module.specs
        self.params = {name: x for name, x in weights.items() if specs[name].kind == "params"}

    @property
    def state(self) -> Any:
        return self._state

    def call(self, params: Arrays, args: tuple[Any, ...], state: Any, key: Any) -> tuple[Any, Any]:
        source = held(self.model, {**self._variables, **(state or {})})
        variables = source.replace({**source.weights, **params}, source.module)
        rngs = {} if key is None else {self.model.rng_collection: key}
        if state is None:
            return self.model.apply(variables, *args, rngs=rngs), None
        output, updates = self.model.apply(variables, *args, rngs=rngs, mutable=list(state))
        return output, {**state, **updates}

    def buffers(self, state: Any) -> Arrays:
        source = held(self.model, {**self._variables, **(state or {})})
        return {name: x for name, x in source.weights.items() if source.module.specs[name].kind == "buffers"}

    def functions(self) -> Iterable[TorchFunction]:
        return self.model.made.module.functions()


def kind_of(model: TorchModule) -> Kind:
    """What a Linen module was made of: torch's weights, or its variables' if it is bound."""
    module = model.module if model.scope is None else to_torch_module(model)

    def wrap(module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        return LinenWrapped(model, module, args, double=double, stateful=stateful)

    return Kind("Linen", module, model._training(), wrap, model.forward_mode, model.channels_last)
