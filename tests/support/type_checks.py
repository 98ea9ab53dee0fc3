"""Run-time checks of every annotation in torchleaf, by jaxtyping and beartype."""

import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_random=False, is_pep484_tower=True))
"""The type checker of the suite: see `--jaxtyping-packages` in pyproject.toml.

A whole number is a `float`, as it is to pyright. It looks at the first items of lists, not at random ones: torchleaf
looks closely, and slowly, at who draws from Python's generator during a trace.
"""

_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Before torchleaf is imported: jaxtyping's import hook decorates by this what mentions none of its types.

    Its own decorator holds the axes of a call's arrays together, for which it binds the arguments of each call: a third
    of the suite's time, if it does so everywhere.
    """
    jaxtyping.jaxtyped = _jaxtyped_or_checked


def _jaxtyped_or_checked(fn: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    if fn is None:
        return functools.partial(_jaxtyped_or_checked, typechecker=typechecker)
    if not isinstance(fn, types.FunctionType) or any(map(_is_jaxtypings, fn.__annotations__.values())):
        return _jaxtyped(fn, typechecker=typechecker)
    fn.__annotations__ = {name: _resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    with_checks = typechecker(fn)
    return functools.wraps(fn)(_switched(fn, with_checks, jaxtyping.config)) if with_checks is not fn else fn


_switched = eval(
    compile(
        """lambda fn, with_checks, config: (
            lambda *args, **kwargs: (fn if config.jaxtyping_disable else with_checks)(*args, **kwargs)
        )""",
        "<@beartype, or not>",  # torchleaf looks for lines of users', and passes over such files
        "eval",
    )
)


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """Without strings; anything, if one names what is imported for other tools alone, as jaxtyping has it."""
    holder = types.SimpleNamespace(__annotations__={"value": hint})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["value"]
    except NameError:
        return Any


def _is_jaxtypings(annotation: Any) -> bool:
    return getattr(annotation, "__module__", "").startswith("jaxtyping") or any(
        map(_is_jaxtypings, typing.get_args(annotation))
    )
