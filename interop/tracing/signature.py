"""Argument names: what a user calls each leaf of a call, and whether the call fits the signature."""

import inspect
from collections.abc import Callable
from typing import Any

from ..modes.random import is_key
from ..values.trees import leaf_names


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
        arguments = [(self._positional(i), value) for i, value in enumerate(args)] + sorted(kwargs.items())
        return [argument + path for argument, value in arguments for path in leaf_names(value)]

    def _positional(self, index: int) -> str:
        parameters = list(self._signature.parameters.values()) if self._signature is not None else []
        for i, parameter in enumerate(parameters):
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{index - i}]"
            if i == index:
                return parameter.name
        return f"args[{index}]"


def signature_of(fn: Callable[..., Any]) -> inspect.Signature | None:
    """Python's signature, or TorchScript's; many builtins of torch have none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        schema = getattr(fn, "schema", None)
    if schema is None:
        return None
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return inspect.Signature(
        [
            inspect.Parameter(a.name, kinds[a.kwarg_only], default=a.default_value if a.has_default_value() else _EMPTY)
            for a in schema.arguments
            if a.name != "self"
        ]
    )


_EMPTY = inspect.Parameter.empty
