"""Argument names: what a user calls each leaf of a call, and whether the call fits the signature."""

from collections.abc import Callable
from typing import Any

from ..modes.random import is_key
from ..values.names import argument_names, signature_of


class Signature:
    """The Python signature of a torch callable; builtins without one accept anything."""

    def __init__(self, fn: Callable[..., Any], name: str):
        self.name, self._signature = name, signature_of(fn)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`TypeError` naming the callable and the argument that is missing or unknown."""
        if self._signature is None:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise TypeError(f"{self.name}{self._signature}: {exc}.") from None

    def wants_key(self, key: Any, args: tuple[Any, ...]) -> bool:
        """Whether `key=` is an argument of the callable itself (attention has one), not a PRNG key for torchleaf."""
        if self._signature is None or "key" not in self._signature.parameters or is_key(key):
            return False
        return "key" not in self._signature.bind_partial(*args).arguments

    def leaf_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Each leaf of `(args, kwargs)` as the user wrote it: `x`, `targets['label']`."""
        return argument_names(self._signature, args, kwargs)
