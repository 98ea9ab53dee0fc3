"""What reverse mode keeps of a JAX call: the residuals of `jax.vjp`, as outputs of the forward call.

Residuals that are operands or outputs are not returned a second time; those that are constants stay in JAX.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from .call import JaxCall
from .errors import failure


class Saved:
    """A call's forward half, which returns its outputs and residuals, and its backward halves, which take them."""

    def __init__(self, call: JaxCall, active: tuple[int, ...]):
        self.call, self.active = call, active
        self._treedef: Any = None
        """The structure of JAX's pullback, whose leaves are the residuals."""
        self._keys: list[Any] = []
        jaxpr = self._trace()
        n_outs, invars, outvars = len(call.out_avals), jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
        constants = dict(zip(map(id, jaxpr.jaxpr.constvars), jaxpr.consts, strict=True))
        places = {id(v): i for i, v in reversed([*enumerate(outvars[:n_outs])])}
        self.operands, self.outs = [], []
        """Which operands, and which outputs of the forward half, the backward halves take."""
        self._sources: list[tuple[str, Any]] = []
        returned = [*range(n_outs)]
        for i, var in enumerate(outvars[n_outs:], n_outs):
            if isinstance(var, Literal):
                aval: Any = var.aval
                self._sources.append(("constant", jnp.asarray(var.val, aval.dtype)))
            elif id(var) in constants:
                self._sources.append(("constant", constants[id(var)]))
            elif var in invars:
                self._sources.append(("operand", _place(self.operands, invars.index(var))))
            else:
                if id(var) not in places:
                    places[id(var)] = len(returned)
                    returned.append(i)
                self._sources.append(("out", _place(self.outs, places[id(var)])))
        run = jaxpr_as_fun(jaxpr)

        def forward(*operands: Any) -> list[Any]:
            outs = run(*operands)
            return [outs[i] for i in returned]

        self.forward = JaxCall(forward, call.avals, call.name)

    def _trace(self) -> Any:
        """The outputs and residuals; what each residual is to the pullback is remembered on the way."""
        call, active = self.call, self.active

        def forward(*x: Any) -> tuple[list[Any], list[Any]]:
            def of_active(*values: Any) -> tuple[list[Any], list[Any]]:
                operands = list(x)
                for i, value in zip(active, values, strict=True):
                    operands[i] = value
                outs = list(call.fn(*operands))
                rest = [y for i, y in enumerate(outs) if i not in call.inexact_outs]
                return [outs[i] for i in call.inexact_outs], rest

            inexact, pullback, rest = jax.vjp(of_active, *(x[i] for i in active), has_aux=True)
            by_place = dict(zip(call.inexact_outs, inexact, strict=True))
            others = iter(rest)
            outs = [by_place[i] if i in by_place else next(others) for i in range(len(call.out_avals))]
            leaves, self._treedef = jax.tree.flatten(pullback)
            self._keys = [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]
            return outs, [jax.random.key_data(x) if _is_key(x) else x for x in leaves]

        try:
            return jax.make_jaxpr(forward)(*call.avals)
        except Exception as exc:
            raise failure(call.name, call.avals, exc) from exc

    def backward(self, wanted: tuple[int, ...], present: tuple[int, ...]) -> JaxCall:
        """The gradients of `wanted` operands, of `(operands it takes, outputs it takes, ct)`."""
        call, n_operands, n_outs = self.call, len(self.operands), len(self.outs)

        def fn(*given: Any) -> Sequence[Any]:
            operands, outs, ct = given[:n_operands], given[n_operands:][:n_outs], given[n_operands + n_outs :]
            values = {"operand": operands, "out": outs}
            leaves = [x if kind == "constant" else values[kind][x] for kind, x in self._sources]
            leaves = [
                x if impl is None else jax.random.wrap_key_data(x, impl=impl)
                for x, impl in zip(leaves, self._keys, strict=True)
            ]
            gradients = call.pull(jax.tree.unflatten(self._treedef, leaves), present, ct)
            return [gradients[self.active.index(i)] for i in wanted]

        def make() -> JaxCall:
            avals = [call.avals[i] for i in self.operands] + [self.forward.out_avals[i] for i in self.outs]
            return JaxCall(fn, avals + [call.out_avals[i] for i in present], f"the gradient of {call.name}")

        return call.remembered(("backward", self.active, wanted, present), make)


def saved(call: JaxCall, active: tuple[int, ...]) -> Saved:
    """The halves of a call, for gradients of `active` operands."""
    return call.remembered(("saved", active), lambda: Saved(call, active))


def _place(places: list[int], index: int) -> int:
    """Where `index` is in `places`, put there if it is not."""
    if index not in places:
        places.append(index)
    return places.index(index)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
