"""The names of things: what a user calls each leaf of a call, and what a module has by a name."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax


def leaf_names(tree: Any) -> list[str]:
    """Names for the leaves of `tree`, as a user would write them: `[0]['weight']`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def argument_names(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Each leaf of `(args, kwargs)` as the user wrote it: `x`, `targets['label']`."""
    arguments = [(_positional(signature, i), value) for i, value in enumerate(args)] + sorted(kwargs.items())
    return [argument + path for argument, value in arguments for path in leaf_names(value)]


def _positional(signature: inspect.Signature | None, index: int) -> str:
    for i, parameter in enumerate(signature.parameters.values() if signature is not None else ()):
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


def found_by_name(module: str | None, qualname: str) -> Any:
    """What an imported module has by a qualified name, if anything."""
    found: Any = sys.modules.get(str(module))
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found
