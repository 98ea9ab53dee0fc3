"""Products with a matrix that torch has expanded over a batch: JAX takes the matrix itself, once for all.

torch expands the weight of a linear layer whose operand does not lie in memory in order, which costs it nothing. XLA
would multiply pair by pair, and make a gradient of the weight for each pair.
"""

from dataclasses import replace
from typing import Any

from .graph import Graph, Node, Ref

_PRODUCTS = {"bmm.default": (1, 0), "baddbmm.default": (2, 1)}
"""Where their operands are, the weight's place first."""
_SAME = ("view.default", "_unsafe_view.default")


def with_matrices_shared(graph: Graph) -> Graph:
    """The same graph with products of matrices that are not expanded."""
    makers = {number: node for node in graph.nodes for number in node.outs}
    return replace(graph, nodes=[_shared(node, graph, makers) for node in graph.nodes])


def _shared(node: Node, graph: Graph, makers: dict[int, Node]) -> Node:
    for place in _PRODUCTS.get(node.name, ()):
        if place < len(node.args):
            number = _before_expansion(node.args[place].number, graph, makers, stops=node.stops)
            if number is not None:
                return replace(node, args=(*node.args[:place], Ref(number), *node.args[place + 1 :]))
    return node


def _before_expansion(number: int, graph: Graph, makers: dict[int, Node], *, stops: bool) -> int | None:
    """The one matrix that a batch of matrices was made of; None if it was not, or where only derivatives stop there."""
    shape = _shape(graph, number)
    maker = makers.get(number)
    while maker is not None and (stops or not maker.stops):
        source = maker.args[0].number
        before = _shape(graph, source)
        if maker.name in _SAME and before == shape:
            maker = makers.get(source)
        elif maker.name == "expand.default" and before in (shape[1:], (1, *shape[1:])):
            return source if before != shape else None
        else:
            return None
    return None


def _shape(graph: Graph, number: int) -> tuple[Any, ...]:
    return tuple(graph.values[number].aval.shape)
