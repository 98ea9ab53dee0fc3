"""A torch module as a Flax NNX module, for checks."""

from collections.abc import Iterable
from typing import Any

import torch
from flax import nnx

from ...interop.function import TorchFunction
from ..module.weights import held, to_torch_module
from ..nnx import TorchModule
from .kinds import Kind, of_modules, widened_options
from .wrapped import Arrays, Wrapped


class NnxWrapped(Wrapped):
    """An NNX module, taken apart and put together again around each call, which updates its Variables."""

    def __init__(self, module: torch.nn.Module, options: dict[str, Any], *, stateful: bool):
        model = TorchModule(module, **options)
        self._module = model._torch.module
        self._module.stand_alone()
        self._graphdef, self._variables = nnx.split(model)
        self._stateful = stateful
        weights = held(model, None).weights
        self.params = {name: x for name, x in weights.items() if self._module.specs[name].kind == "params"}

    @property
    def state(self) -> Any:
        return self._variables if self._stateful else None

    def call(self, params: Arrays, args: tuple[Any, ...], state: Any, key: Any) -> tuple[Any, Any]:
        model = self._model(state)
        source = held(model, None)
        source.replace({**source.weights, **params}, source.module)
        output = model(*args, rngs=key)
        return output, None if state is None else nnx.split(model)[1]

    def buffers(self, state: Any) -> Arrays:
        weights = held(self._model(state), None).weights
        return {name: x for name, x in weights.items() if self._module.specs[name].kind == "buffers"}

    def functions(self) -> Iterable[TorchFunction]:
        return self._module.functions()

    def _model(self, state: Any) -> TorchModule:
        return nnx.merge(self._graphdef, self._variables if state is None else state, copy=True)


def kind_of(model: TorchModule) -> Kind:
    """What an NNX module was made of, with its Variables' values."""
    own = model._torch.module

    def wrap(module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        options = of_modules(widened_options(own.options, double=double))
        return NnxWrapped(module, {**options, "channels_last": own.channels_last}, stateful=stateful)

    training = not model.deterministic
    return Kind("NNX", to_torch_module(model), training, wrap, own.options.forward_mode, own.channels_last)
