"""Products with a matrix that torch has expanded over a batch, or transposed: JAX takes the matrix itself.

torch expands the weight of a linear layer whose operand does not lie in memory in order, which costs it nothing. XLA
would multiply pair by pair, and make a gradient of the weight for each pair. And torch transposes each weight, which
XLA would do for real where matrices are small; it contracts other axes instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .graph import Graph, Node, Ref

_PRODUCTS = {"mm.default": (1,), "addmm.default": (2,), "bmm.default": (1, 0), "baddbmm.default": (2, 1)}
"""Where their operands are, the weight's place first."""
_BATCHES = ("bmm.default", "baddbmm.default")
_SAME = ("view.default", "_unsafe_view.default", "expand.default")
"""Ops that change nothing where they keep the shape."""


def with_plain_matrices(graph: Graph) -> Graph:
    """The same graph with products of matrices that are neither expanded nor transposed."""
    makers = {number: node for node in graph.nodes for number in node.outs}
    return replace(graph, nodes=[_transposing(_sharing(node, graph, makers), graph, makers) for node in graph.nodes])


def _sharing(node: Node, graph: Graph, makers: Mapping[int, Node]) -> Node:
    for place in _PRODUCTS[node.name] if node.name in _BATCHES else ():
        number = _before_expansion(node.args[place].number, graph, makers, stops=node.stops)
        if number is not None:
            return _with(node, place, number)
    return node


def _before_expansion(number: int, graph: Graph, makers: Mapping[int, Node], *, stops: bool) -> int | None:
    """The one matrix that a batch of matrices was made of; None if it was not."""
    shape = _shape(graph, number)
    for maker in _makers_of(number, makers, stops=stops):
        before = _shape(graph, maker.args[0].number)
        if maker.name in _SAME and before == shape:
            continue
        is_expansion = maker.name == "expand.default" and before in (shape[1:], (1, *shape[1:]))
        return maker.args[0].number if is_expansion else None
    return None


def _transposing(node: Node, graph: Graph, makers: Mapping[int, Node]) -> Node:
    place = next(iter(_PRODUCTS.get(node.name, ())), None)
    if place is None:
        return node
    number = node.args[place].number
    shape = _shape(graph, number)
    for maker in _makers_of(number, makers, stops=node.stops):
        source = maker.args[0].number
        if _swaps(maker, len(shape)):
            return replace(_with(node, place, source), kwargs={**node.kwargs, "is_transposed": True})
        if maker.name not in _SAME or _shape(graph, source) != shape:
            return node
    return node


def _swaps(node: Node, ndim: int) -> bool:
    """Whether a node exchanges the last two axes of a matrix, or of a batch of matrices."""
    if node.name == "t.default":
        return ndim == 2
    if node.name == "transpose.int":
        return {axis % ndim for axis in node.args[1:]} == {ndim - 2, ndim - 1}
    if node.name == "permute.default":
        return [axis % ndim for axis in node.args[1]] == [*range(ndim - 2), ndim - 1, ndim - 2]
    return False


def _makers_of(number: int, makers: Mapping[int, Node], *, stops: bool) -> Iterator[Node]:
    """What made a value, and what made its first argument, and so on, but where derivatives stop there and not here."""
    maker = makers.get(number)
    while maker is not None and (stops or not maker.stops) and maker.args and isinstance(maker.args[0], Ref):
        yield maker
        maker = makers.get(maker.args[0].number)


def _with(node: Node, place: int, number: int) -> Node:
    return replace(node, args=(*node.args[:place], Ref(number), *node.args[place + 1 :]))


def _shape(graph: Graph, number: int) -> tuple[Any, ...]:
    return tuple(graph.values[number].aval.shape)
