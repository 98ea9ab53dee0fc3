"""The ops of a torch callable, in order, as functions of numbered values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..types import Aval


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by its number."""

    number: int


@dataclass(frozen=True)
class Measure:
    """A number that follows from sizes which are not known."""

    make: Callable[[], Any]
    """What makes an array of it, within a program."""


@dataclass(frozen=True)
class Value:
    """What is known of a value beforehand."""

    aval: Aval
    """Its shape, and the dtype that JAX gives it."""
    dtype: torch.dtype
    """The one that it has in torch."""


@dataclass(frozen=True)
class Node:
    """One op."""

    name: str
    """That of the op, without `aten::`, for errors and for tables."""
    function: Callable[..., Any]
    """What computes it of JAX arrays."""
    args: tuple[Any, ...]
    """With a `Ref` for each tensor, in lists as well."""
    kwargs: Mapping[str, Any]
    outs: tuple[int, ...]
    """The numbers of the values that it makes."""
    stops: bool
    """Whether no derivative passes: torch ran it without gradients."""
    is_carried: bool = False
    """Whether torch computes it."""
    draws: bool = False
    """Whether its function is given a `key`."""

    def reads(self) -> Iterator[int]:
        """The numbers of the values that it takes."""
        yield from _numbers((self.args, tuple(self.kwargs.values())))


@dataclass(frozen=True)
class Check:
    """What a callable raises an error by."""

    value: int
    """The number of a bool."""
    passes: bool
    """What it is where there is no error."""
    error: str
    """What is raised where it is not."""


@dataclass(frozen=True)
class Graph:
    """Ops that make the outputs out of the operands, which have the first numbers, and of constants."""

    values: Sequence[Value]
    constants: Mapping[int, Any]
    nodes: Sequence[Node]
    outputs: tuple[int, ...]
    checks: Sequence[Check] = ()
    """In the order in which the callable makes them."""

    def needed(self) -> "Graph":
        """The same without what no output and no check depends on."""
        live, nodes = {*self.outputs, *(check.value for check in self.checks)}, []
        for node in reversed(self.nodes):
            if live.intersection(node.outs):
                live.update(node.reads())
                nodes.append(node)
        constants = {number: x for number, x in self.constants.items() if number in live}
        return replace(self, constants=constants, nodes=nodes[::-1])

    @property
    def has_known_sizes(self) -> bool:
        """Whether all of its sizes are known."""
        return all(isinstance(n, int) for value in self.values for n in value.aval.shape)

    def carried(self) -> tuple[str, ...]:
        """The names of ops that torch computes, each once."""
        return tuple(dict.fromkeys(node.name for node in self.nodes if node.is_carried))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Ref):
        yield value.number
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
