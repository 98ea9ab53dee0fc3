"""torch's expressions of sizes as JAX's: sums, products, quotients and remainders of dimension variables.

torch has them as expressions of sympy, among them functions of its own, which are told by their names. Numbers that
are no sizes, such as `n ** 0.5`, become arrays when the program runs.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import sympy
from jax.core import max_dim, min_dim

from ..errors import TorchCallError


def size_of(expr: Any, dims: Mapping[str, Any]) -> Any:
    """An expression of sizes as a dimension of JAX's.

    **Arguments:**

    - `expr`: torch's.
    - `dims`: JAX's dimensions by the names of torch's symbols.
    """
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return dims[expr.name]
    kind, given = type(expr).__name__, expr.args
    if kind in ("TruncToInt", "FloorToInt") and type(given[0]).__name__ == "IntTrueDiv":  # `int(n / 2)`
        kind, given = "FloorDiv", given[0].args
    if kind not in _OF_SIZES:
        raise TorchCallError(
            f"it computes a size by {kind}, which JAX's symbolic sizes do not have. Use //, %, + and *, or export "
            "with sizes that are known, once for each size."
        )
    return _OF_SIZES[kind](*(size_of(x, dims) for x in given))


def constant_of(expr: Any, dims: Mapping[str, Any]) -> int | None:
    """The number that an expression of sizes is for all of them, if it is one."""
    found = size_of(expr, dims) if expr.is_integer else None
    return found if isinstance(found, int) else None


def number_of(expr: Any, dims: Mapping[str, Any]) -> Any:
    """An expression of sizes that is a number to compute with, as an array without axes."""
    if expr.is_integer:
        return jnp.asarray(size_of(expr, dims))
    if expr.is_Number:
        return jnp.asarray(float(expr))
    kind = type(expr).__name__
    name = kind.removeprefix("OpaqueUnaryFn_")
    function = getattr(jnp, name, None) if name != kind else _OF_NUMBERS.get(kind)
    if function is None:
        raise TorchCallError(
            f"it computes a number by {kind} of a symbolic size. Make a tensor of the size, and compute with that, or "
            "export with sizes that are known, once for each size."
        )
    return function(*(number_of(x, dims).astype(float) for x in expr.args))


def _folded(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *given: functools.reduce(function, given)


def _order(n: Any) -> tuple[bool, str]:
    """As JAX's own functions have them, so that equal ones are seen to be equal: numbers last."""
    return isinstance(n, int), str(n)


_OF_SIZES: dict[str, Callable[..., Any]] = {
    "Add": _folded(operator.add),
    "Mul": _folded(operator.mul),
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": lambda a, divisor, modulus: a // divisor % modulus,
    "Max": lambda *given: functools.reduce(max_dim, sorted(given, key=_order)),
    "Min": lambda *given: functools.reduce(min_dim, sorted(given, key=_order)),
    "Identity": lambda a: a,
}

_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "Add": _folded(operator.add),
    "Mul": _folded(operator.mul),
    "Pow": operator.pow,
    "FloatPow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv,
    "ToFloat": lambda a: a,
    "Max": _folded(jnp.maximum),
    "Min": _folded(jnp.minimum),
}


def truth_of(expr: Any, dims: Mapping[str, Any]) -> bool | None:
    """Whether a statement about sizes holds for all of them; None if that depends, or is not seen."""
    kind = type(expr).__name__
    if kind in ("BooleanTrue", "BooleanFalse"):
        return kind == "BooleanTrue"
    if kind in ("And", "Or"):
        parts, settles = [truth_of(x, dims) for x in expr.args], kind == "Or"
        if settles in parts:
            return settles
        return None if None in parts else not settles
    if kind == "Not":
        inner = truth_of(expr.args[0], dims)
        return None if inner is None else not inner
    if kind not in _COMPARISONS:
        return None
    try:
        left, right = (size_of(x, dims) for x in _without_common_factors(*expr.args))
    except TorchCallError:
        return None
    return _COMPARISONS[kind](left, right)


def _without_common_factors(a: Any, b: Any) -> tuple[Any, Any]:
    """Two sides of a comparison, divided by variables that both have, and which are positive."""
    of_a, of_b = list(sympy.Mul.make_args(a)), list(sympy.Mul.make_args(b))
    for factor in [x for x in of_a if x.is_Symbol or (x.is_Integer and x > 0)]:
        if factor in of_b:
            of_a.remove(factor)
            of_b.remove(factor)
    return sympy.Mul(*of_a), sympy.Mul(*of_b)


def provable(comparison: Callable[[Any, Any], bool], a: Any, b: Any) -> bool | None:
    """What JAX says of a comparison of sizes; None where it cannot tell."""
    try:
        return bool(comparison(a, b))
    except jax.errors.InconclusiveDimensionOperation:
        return None


def _equal(a: Any, b: Any) -> bool | None:
    if a == b:
        return True
    return False if provable(operator.gt, a, b) or provable(operator.lt, a, b) else None


def _unequal(a: Any, b: Any) -> bool | None:
    equal = _equal(a, b)
    return None if equal is None else not equal


_COMPARISONS: dict[str, Callable[[Any, Any], bool | None]] = {
    "Equality": _equal,
    "Unequality": _unequal,
    "GreaterThan": functools.partial(provable, operator.ge),
    "StrictGreaterThan": functools.partial(provable, operator.gt),
    "LessThan": functools.partial(provable, operator.le),
    "StrictLessThan": functools.partial(provable, operator.lt),
}
