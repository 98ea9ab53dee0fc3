"""A callable at one signature as a JAX function of its operands: a graph whose ops JAX computes, one after another."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import TorchCallError, quote
from ..internals.ops import torch_pytree
from ..tracing.trace import Trace
from ..types import CallOptions
from .dtypes import cast
from .gradient_hooks import without_derivative
from .graph import Graph, Measure, Node, Ref
from .promotion import promoting
from .shared_state import new_state
from .value_checks import enforced


class Computed:
    """What is kept for each signature.

    **Arguments:**

    - `name`: the callable's.
    - `graph`: what it computes; its outputs are those of the callable, and then new values of state.
    - `found`: what tracing found.
    - `options`: the user's.
    - `operands`: the names of its operands, without a key.
    - `no_derivative`: why it may not be differentiated, if it may not.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        found: Trace,
        options: CallOptions,
        operands: Sequence[str],
        *,
        no_derivative: str | None = None,
    ):
        self._name, self.graph, self.found, self._operands = name, graph, found, operands
        self._strict = options.strict
        self._given = (lambda x: x) if no_derivative is None else without_derivative(f"{name} {no_derivative}")

        @promoting
        def run(*operands: Any) -> list[Any]:
            return self._run(operands)

        run.__name__ = run.__qualname__ = name
        # Inlined, since XLA keeps axes in the order that convolutions want within one function only.
        self.program = jax.jit(jax.checkpoint(run) if options.residuals == "recompute" else run, inline=True)

    def _run(self, operands: Sequence[Any]) -> list[Any]:
        env: dict[int, Any] = dict(enumerate(map(self._given, operands[: len(self._operands)])))
        env |= {number: jnp.asarray(x) for number, x in self.graph.constants.items()}
        key, n_drawn = (_typed(operands[-1]), 0) if self.found.random else (None, 0)
        for node in self.graph.nodes:
            more: dict[str, Any] = {}
            if node.draws:
                more, n_drawn = {"key": None if key is None else jax.random.fold_in(key, n_drawn)}, n_drawn + 1
            self._compute(node, env, more)
        results, state = [jnp.asarray(env[i]) for i in self.graph.outputs], self.found.state
        results = enforced(self._name, self.graph.checks, env, results, raises=not self._strict)
        n_outputs, names = len(results) - len(state), [self._operands[i] for i in state]
        new = new_state(self._name, names, [operands[i] for i in state], results[n_outputs:])
        return [*results[:n_outputs], *new]

    def _compute(self, node: Node, env: dict[int, Any], more: dict[str, Any]) -> None:
        # What torch computes without gradients need not have a derivative.
        given = jax.lax.stop_gradient if node.stops and node.is_carried else lambda x: x

        def array(x: Any) -> Any:
            return given(env[x.number]) if isinstance(x, Ref) else x.make()

        args, kwargs = torch_pytree.tree_map_only((Ref, Measure), array, (node.args, node.kwargs))
        with jax.named_scope(node.name):
            result = self._result(node, args, kwargs | more)
            results = [x for x in _flat(result) if x is not None]
            for number, x in zip(node.outs, results, strict=True):
                aval = self.graph.values[number].aval
                if jnp.shape(x) != aval.shape:
                    raise TorchCallError(
                        f"{self._name}: JAX's function for {node.name} returned shape {jnp.shape(x)}, but torch's has "
                        f"{aval.shape}. This is a fault of torchleaf's; use engine='torch' for this callable."
                    )
                value = cast(x, aval.dtype)
                env[number] = jax.lax.stop_gradient(value) if node.stops else value

    def _result(self, node: Node, args: Any, kwargs: Any) -> Any:
        try:
            return node.function(*args, **kwargs)
        except TorchCallError:
            raise
        except Exception as exc:
            if self.graph.has_known_sizes:
                raise
            raise TorchCallError(
                f"{self._name}: JAX's function for {node.name} needs sizes that are known. Export with sizes that are "
                f"known, once for each size.\nJAX said: {quote(exc)}"
            ) from exc


def _flat(result: Any) -> list[Any]:
    if isinstance(result, list | tuple):
        return [x for item in result for x in _flat(item)]
    return [result]


def _typed(words: Any) -> Any:
    return jax.random.wrap_key_data(words, impl="threefry2x32" if words.shape[-1] == 2 else "rbg")
