"""What `JaxModule` asks of a model, whatever framework it is of."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import jax

from . import pickling
from .leaves import Leaves


class Kind(ABC):
    """A model without its arrays: how it is called with others, and put together of them."""

    name: str
    """How errors and `repr` call it."""

    arrays: dict[str, jax.Array]
    """Each array once, by the name it has in torch."""
    trainable: frozenset[str]
    """Which are parameters; others are buffers."""
    stateful: frozenset[str]
    """Which buffers a call may change."""
    aliases: dict[str, str]
    """Further names of arrays that the model has in several places."""

    def forget(self) -> None:
        """The arrays, which live in torch from now on."""
        self.arrays = {}

    @abstractmethod
    def call(
        self, arrays: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        """What the model returns, and the buffers that are other ones after the call."""

    @abstractmethod
    def model(self, arrays: Mapping[str, jax.Array]) -> Any:
        """What `JaxModule` was given, with these arrays."""

    def __reduce__(self) -> Any:
        return _loaded, (pickling.dumps((type(self), vars(self))),)


def _loaded(data: bytes) -> Kind:
    cls, state = pickling.loads(data)
    kind = object.__new__(cls)
    vars(kind).update(state)
    return kind


class FunctionKind(Kind):
    """A function and a pytree that is its first argument."""

    def __init__(self, fn: Callable[..., Any], params: Any, trainable: Any):
        self._fn = fn
        self._leaves = Leaves(params, trainable)
        self.name = getattr(fn, "__qualname__", type(fn).__qualname__)
        self.stateful = frozenset()
        self.arrays, self.trainable = self._leaves.arrays, frozenset(self._leaves.trainable)
        self.aliases = self._leaves.aliases
        self._takes_key = takes(fn, "key")

    def forget(self) -> None:
        super().forget()
        self._leaves.arrays = {}

    def call(
        self, arrays: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        if self._takes_key:
            kwargs = {"key": key, **kwargs}
        if takes(self._fn, "training"):
            kwargs = {"training": training, **kwargs}
        return self._fn(self._leaves.tree(arrays), *args, **kwargs), {}

    def model(self, arrays: Mapping[str, jax.Array]) -> Any:
        return self._fn, self._leaves.tree(arrays)


def takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a callable has an argument of a name."""
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
