"""Sizes that are not known: JAX's dimension variables, and torch's symbols in their place while it is traced."""

import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch

from ..errors import TorchCallError
from ..internals.fake import new_size
from ..internals.ops import torch_pytree
from .decisions import Decisions
from .expressions import number_of, provable, size_of
from .graph import Measure
from .names import parameters, size_names


def is_symbolic(x: Any) -> bool:
    """Whether x is a size of JAX's that is not known."""
    return jax.export.is_symbolic_dim(x)


class Sizes:
    """The sizes of one signature.

    **Arguments:**

    - `name`: the callable's, for errors.
    - `shapes`: those of its operands, at least one of them symbolic.
    """

    def __init__(self, name: str, shapes: Sequence[Sequence[Any]]):
        self._name = name
        dims = list(dict.fromkeys(n for shape in shapes for n in shape if is_symbolic(n)))
        scope = dims[0].scope
        names = list(dict.fromkeys(v for dim in dims for v in _variables(dim)))
        variables = {v: jax.export.symbolic_shape(v, scope=scope)[0] for v in names}
        self.example = _example(variables, [str(n) for n in dims], _constraints(scope))
        """A size for each variable, by which torch is tried."""
        self._by_symbol: dict[str, Any] = {}
        self.env = Decisions(name, self._by_symbol)
        self._symints: dict[str, torch.SymInt] = {}
        for v, dim in variables.items():
            lowest, highest = _bounds(dim)
            symbol, self._symints[v] = new_size(self.env, v, self.example[v], lowest, highest)
            self._by_symbol[symbol] = dim

    def in_torch(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """A shape of JAX's with torch's symbols."""
        return tuple(_value(n, self._symints) if is_symbolic(n) else n for n in shape)

    def in_example(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """A shape of JAX's at the sizes of the example."""
        return tuple(_value(n, self.example) if is_symbolic(n) else n for n in shape)

    def in_jax(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """A shape of torch's with JAX's dimensions."""
        return tuple(map(self.size, shape))

    def check(self, leaves: Sequence[Any]) -> None:
        """Refuse what a traced callable returned that is, or was, no constant."""
        if self.env.refusal is not None:
            raise self.env.refusal  # which the callable, or torch, caught
        if any(isinstance(x, (*_SYMBOLIC, torch.SymBool)) for x in leaves):
            raise TorchCallError(
                f"{self._name} returns a symbolic size as a number, which a program's output cannot be. Return "
                "torch.tensor(size), or export with sizes that are known, once for each size."
            )

    def size(self, n: Any) -> Any:
        """One size of torch's as one of JAX's."""
        return size_of(n.node.expr, self._by_symbol) if isinstance(n, _SYMBOLIC) else n

    def arguments(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of an op, or of another function of tensors, with JAX's sizes.

        Where an op takes a number, and not a size or a position, it is a number to compute with.
        """
        names = parameters(func)
        numbers = frozenset(names) - size_names(func)

        def brought(name: str, value: Any) -> Any:
            if name in numbers:
                return torch_pytree.tree_map_only(_SYMBOLIC, lambda n: Measure(lambda: self._number(n)), value)
            return torch_pytree.tree_map_only(_SYMBOLIC, self.size, value)

        named = itertools.zip_longest(names[: len(args)], args, fillvalue="")
        return tuple(brought(*x) for x in named), {k: brought(k, v) for k, v in kwargs.items()}

    def _number(self, n: Any) -> jax.Array:
        return number_of(n.node.expr, self._by_symbol)


_SYMBOLIC = (torch.SymInt, torch.SymFloat)


# --- JAX's dimensions, as it writes them ----------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": torch.sym_max,
    "min": torch.sym_min,
}


def _variables(dim: Any) -> Iterator[str]:
    yield from (word for word in re.findall(r"[A-Za-z_]\w*", str(dim)) if word not in _FUNCTIONS)


def _value(text: Any, values: Mapping[str, Any]) -> Any:
    """What an expression or a statement, as JAX reads and writes it, is of numbers or of torch's symbols."""
    return eval(str(text).replace("^", "**"), {"__builtins__": {}}, {**_FUNCTIONS, **values})


def _constraints(scope: Any) -> list[str]:
    """What a user said of sizes, as it was written."""
    return [line.strip() for line in str(scope).partition(" with constraints:")[2].splitlines() if line.strip()]


def _bounds(dim: Any) -> tuple[int, int | None]:
    """The least and the largest value of a size, as far as JAX knows them."""
    lowest = max((n for n in range(1, _MOST_TRIED) if provable(operator.ge, dim, n)), default=1)
    return lowest, next((n for n in range(lowest, _MOST_TRIED) if provable(operator.le, dim, n)), None)


_MOST_TRIED = 129


def _example(variables: Mapping[str, Any], dims: Sequence[str], constraints: Sequence[str]) -> dict[str, int]:
    """Sizes that fit the constraints; different ones, and no ones, if that can be."""
    least = [_bounds(dim)[0] for dim in variables.values()]
    choices = [sorted(_TRIED, key=lambda n, low=low: (n < low, n == 1, n < 5, n)) for low in least]
    found: dict[str, int] | None = None
    for values in itertools.islice(itertools.product(*choices), _MOST_EXAMPLES):
        sizes = dict(zip(variables, values, strict=True))
        fits = all(_value(c, sizes) for c in constraints if set(_variables(c)) <= sizes.keys())
        if fits and all(_value(n, sizes) > 0 for n in dims):
            found = found or sizes
            if len(set(values)) == len(values):
                return sizes
    return found or dict(zip(variables, least, strict=True))


_TRIED = (*range(1, 17), 18, 20, 21, 24, 25, 28, 30, 32, 36, 40, 48, 64, 96, 128, 256)
_MOST_EXAMPLES = 5000
