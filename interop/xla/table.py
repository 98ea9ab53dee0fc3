"""Which function of JAX arrays stands for an ATen op: found by name, loaded when an engine asks first.

A function takes what the op takes, JAX arrays in the place of tensors. One that has a parameter `out` is given the
avals of its results (a single one as it is), one that has `key` a PRNG key. Results are brought to the dtypes that
torch gives them, so no function need end with a cast.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Size = Any
"""A size or a position among the arguments of an op: a number, or a symbolic one of JAX's."""

_SUBJECTS = (
    "elementwise",
    "arithmetic",
    "several",
    "gamma",
    "bessel",
    "modified_bessel",
    "airy",
    "polynomials",
    "activations",
    "reductions",
    "shapes",
    "padding",
    "indexing",
    "scattering",
    "counting",
    "factories",
    "linear",
    "factorisations",
    "convolution",
    "pooling",
    "normalisation",
    "attention",
    "recurrent",
    "losses",
    "fourier",
    "random",
    "sampling",
    "sorting",
    "backward",
)


@dataclass(frozen=True)
class Op:
    """A function of JAX arrays, and what it wants beside them."""

    function: Callable[..., Any]
    wants_out: bool
    wants_key: bool
    updates: bool
    """Whether it returns new values of operands that it would write into, after its results."""


_TABLE: dict[str, Op] = {}


def op(*names: str, updates: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for ops, each by its name, `add`, or by that of one overload, `max.dim`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters
        for name in names:
            assert name not in _TABLE, name
            _TABLE[name] = Op(function, "out" in parameters, "key" in parameters, updates)
        return function

    return register


def find(name: str) -> Op | None:
    """The function for an op `name.overload`; None if there is none."""
    table = load()
    return table.get(name) or table.get(name.partition(".")[0])


@functools.cache
def load() -> dict[str, Op]:
    """All functions by the names of their ops."""
    for subject in _SUBJECTS:
        importlib.import_module(f".ops.{subject}", __package__)
    return _TABLE
