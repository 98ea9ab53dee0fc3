"""A specimen as an Equinox module: its outputs as a function of parameters and arguments."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf

from .specimen import Specimen
from .torch_side import changes_state, to_numpy, weights_of


class Ours:
    """A specimen as a `torchleaf.TorchModule`, its trainable parameters apart from the rest."""

    def __init__(self, specimen: Specimen, *, double: bool = False, training: bool | None = None):
        self._specimen, self._double = specimen, double
        module = specimen.module(double=double, training=training)
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.model, state = torchleaf.TorchModule(module), None
        if changes_state(specimen, training=training):
            self.model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
        self._state = jax.tree.flatten(state)
        self.params, self._rest = eqx.partition(self.model, torchleaf.trainable(self.model))

    @property
    def state(self) -> Any:
        """The first state, if there is one; Equinox lets each object be used once."""
        leaves, treedef = self._state
        return jax.tree.unflatten(treedef, leaves)

    def arguments(self, number: int) -> tuple[Any, Any]:
        """Arrays and static values of the arguments of one call."""
        return arrays_of(self._specimen.arguments(number, double=self._double))

    def call(self, params: Any, arrays: Any, static: Any, state: Any = None, key: Any = None) -> tuple[list[Any], Any]:
        """The outputs that are compared, and the new state."""
        model, args = eqx.combine(params, self._rest), eqx.combine(arrays, static)
        result = model(*args, key=key) if state is None else model(*args, key=key, state=state)
        output, state = (result, None) if state is None else result
        return [y for y in jax.tree.leaves(self._specimen.output(output)) if eqx.is_array(y)], state

    def outputs(self, params: Any, arrays: Any, static: Any) -> list[Any]:
        """The outputs that are compared."""
        return self.call(params, arrays, static, self.state)[0]

    def gradients(self, params: Any, arrays: Any, static: Any) -> list[Any]:
        """As `Torch.gradients`, in torch's convention for complex numbers."""
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)
        grads = jax.grad(lambda p, x: weighted_sum(self.outputs(p, eqx.combine(x, others), static)), (0, 1))(
            params, floats
        )
        return [jnp.conj(g) for g in jax.tree.leaves(self.in_order(grads))]

    def in_order(self, params_and_floats: tuple[Any, Any]) -> tuple[list[Any], Any]:
        """Parameters in torch's order, as a list: JAX sorts a dict by names."""
        params, floats = params_and_floats
        return [params.params[name] for name in self._names], floats

    def from_order(self, parameters_and_floats: tuple[list[Any], Any]) -> tuple[Any, Any]:
        """The way back."""
        parameters, floats = parameters_and_floats
        named = dict(zip(self._names, parameters, strict=True))
        return eqx.tree_at(lambda model: model.params, self.params, named), floats


def arrays_of(args: Any) -> tuple[Any, Any]:
    """Tensors as arrays with JAX's dtypes, apart from static values."""
    converted = jax.tree.map(lambda x: array_of(x) if isinstance(x, torch.Tensor) else x, args)
    return eqx.partition(converted, eqx.is_array)


def array_of(tensor: torch.Tensor) -> jax.Array:
    """A copy with JAX's dtype."""
    array = to_numpy(tensor)
    return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))


def weighted_sum(outputs: list[Any]) -> Any:
    """`torch_side.weighted_sum` in JAX."""
    terms = [jnp.sum(weights_of(y.size).astype(y.dtype) * y.ravel()) for y in outputs if eqx.is_inexact_array(y)]
    return sum((jnp.real(t) for t in terms), jnp.zeros(()))


def mean_square(outputs: list[Any]) -> Any:
    """`torch_side.mean_square` in JAX."""
    return sum((jnp.mean(jnp.abs(y) ** 2) for y in outputs if eqx.is_inexact_array(y)), jnp.zeros(()))


def numpy_of(arrays: list[Any]) -> list[np.ndarray]:
    """Copies."""
    return [np.array(x) for x in arrays]
