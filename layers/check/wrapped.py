"""A torch module as its framework has it: called with weights and state as values, as every check wants it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import torch

from ...interop.function import TorchFunction
from ..equinox import TorchModule

Arrays = dict[str, Any]
"""Arrays by torch name."""


class Wrapped(ABC):
    """What a framework made of a torch module. It shares no traces with the user's own."""

    params: Arrays
    """The parameters with `requires_grad`."""

    @property
    @abstractmethod
    def state(self) -> Any:
        """The first state, a pytree; None if calls change none."""

    @abstractmethod
    def call(self, params: Arrays, args: tuple[Any, ...], state: Any, key: Any) -> tuple[Any, Any]:
        """What a call returns, and the new state."""

    @abstractmethod
    def buffers(self, state: Any) -> Arrays:
        """torch's buffers in a state."""

    @abstractmethod
    def functions(self) -> Iterable[TorchFunction]:
        """The functions that calls have gone through, to ask how they ran."""


class EquinoxWrapped(Wrapped):
    """An Equinox module, with an `eqx.nn.State` if it changes buffers."""

    def __init__(self, module: torch.nn.Module, options: Mapping[str, Any], *, stateful: bool):
        state = None
        if stateful:
            self.model, state = eqx.nn.make_with_state(TorchModule)(module, **options)
        else:
            self.model = TorchModule(module, **options)
        self.model.module.stand_alone()
        self._state = jax.tree.flatten(state)
        self.params = self.model.params

    @property
    def state(self) -> Any:
        leaves, treedef = self._state  # Equinox lets each object be used once
        return jax.tree.unflatten(treedef, leaves)

    def call(self, params: Arrays, args: tuple[Any, ...], state: Any, key: Any) -> tuple[Any, Any]:
        model = eqx.tree_at(lambda model: model.params, self.model, params)
        return (model(*args, key=key), None) if state is None else model(*args, key=key, state=state)

    def buffers(self, state: Any) -> Arrays:
        return self.model.buffers_in(state)

    def functions(self) -> Iterable[TorchFunction]:
        return self.model.module.functions()


class FunctionWrapped(Wrapped):
    """What `torch_function` makes of a torch function: it has neither weights nor state."""

    def __init__(self, function: TorchFunction):
        self._function, self.params = function, {}

    @property
    def state(self) -> Any:
        return None

    def call(self, params: Arrays, args: tuple[Any, ...], state: Any, key: Any) -> tuple[Any, Any]:
        return (self._function(*args) if key is None else self._function(*args, key=key)), None

    def buffers(self, state: Any) -> Arrays:
        return {}

    def functions(self) -> Iterable[TorchFunction]:
        return (self._function,)
