"""A subject in JAX: its outputs as a function of parameters and arguments, by a call of its framework's module."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch

from ...interop.values import dtypes
from ...interop.values.trees import flatten_registering
from .numbers import to_numpy, weights_of
from .subject import Subject


class Ours:
    """A subject as torchleaf has it. Its parameters are a list, in torch's order; JAX sorts a dict by names."""

    def __init__(self, subject: Subject, *, double: bool, drawing: bool, stateful: bool):
        self._subject, self._double = subject, double
        module = subject.module(double=double, drawing=drawing)
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        args = eqx.combine(*self.arguments(0))
        self.wrapped = subject.wrap(module, args, double=double, stateful=stateful)
        self.params = [self.wrapped.params[name] for name in self._names]

    @property
    def state(self) -> Any:
        """The first state, if there is one."""
        return self.wrapped.state

    def arguments(self, number: int) -> tuple[Any, Any]:
        """Arrays and static values of the arguments of one call."""
        return arrays_of(self._subject.arguments(number, double=self._double))

    def call(self, params: Any, arrays: Any, static: Any, state: Any = None, key: Any = None) -> tuple[list[Any], Any]:
        """The outputs that are compared, and the new state."""
        named = dict(zip(self._names, params, strict=True))
        output, state = self.wrapped.call(named, eqx.combine(arrays, static), state, key)
        return [y for y in jax.tree.leaves(self._subject.output(output)) if eqx.is_array(y)], state

    def outputs(self, params: Any, arrays: Any, static: Any, key: Any = None) -> list[Any]:
        """The outputs that are compared."""
        return self.call(params, arrays, static, self.state, key)[0]

    def gradients(self, params: Any, arrays: Any, static: Any) -> list[Any]:
        """As `Torch.gradients`, in torch's convention for complex numbers."""
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)
        grads = jax.grad(lambda p, x: weighted_sum(self.outputs(p, eqx.combine(x, others), static)), (0, 1))(
            params, floats
        )
        return [jnp.conj(g) for g in jax.tree.leaves(grads)]

    def slope(self, params: Any, arrays: Any, static: Any, direction: list[Any]) -> Any:
        """The derivative of `weighted_sum` along a direction, by forward mode."""
        return weighted_sum(self.pushed(params, arrays, static, direction))

    def pushed(self, params: Any, arrays: Any, static: Any, direction: list[Any]) -> list[Any]:
        """The derivatives of the inexact outputs along a direction, by forward mode; zeros for the others."""
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)
        point, treedef = jax.tree.flatten((params, floats))
        cast = [jnp.asarray(d).astype(x.dtype) for d, x in zip(direction, point, strict=True)]
        tangents = jax.tree.unflatten(treedef, cast)
        function = lambda p, x: self.outputs(p, eqx.combine(x, others), static)  # noqa: E731
        outputs, pushed = jax.jvp(function, (params, floats), tangents)
        return [t if eqx.is_inexact_array(y) else jnp.zeros(y.shape) for y, t in zip(outputs, pushed, strict=True)]


def arrays_of(args: Any) -> tuple[Any, Any]:
    """Tensors as arrays with JAX's dtypes, apart from static values."""
    leaves, treedef = flatten_registering(args)
    converted = jax.tree.unflatten(treedef, [array_of(x) if isinstance(x, torch.Tensor) else x for x in leaves])
    return eqx.partition(converted, eqx.is_array)


def array_of(x: torch.Tensor) -> jax.Array:
    """A tensor as an array with JAX's dtype, copied without torchleaf's help."""
    return jnp.array(to_numpy(x)).astype(dtypes.canonical(x.dtype))


@jax.jit
def weighted_sum(outputs: list[Any]) -> Any:
    """`torch_side.weighted_sum` in JAX."""
    terms = [jnp.sum(jnp.asarray(weights_of(y.size)).astype(y.dtype) * y.ravel()) for y in outputs if _is_inexact(y)]
    return sum((jnp.real(t) for t in terms), jnp.zeros(()))


def _is_inexact(y: Any) -> bool:
    return jnp.issubdtype(y.dtype, jnp.inexact)
