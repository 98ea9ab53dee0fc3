"""`torchleaf.nnx.TorchModule` as users of NNX use it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import torch
import torchleaf
from flax import nnx
from flax.traverse_util import unflatten_dict

from .model import Gradients, Leaves, Model, Program, Weights, hide, show


class NNXModel(Model):
    name = "nnx"
    key_remedy = "Make TorchModule with `rngs=nnx.Rngs"

    def __init__(self, module: torch.nn.Module, *, with_state: bool = False, **options: Any):
        self.model = torchleaf.nnx.TorchModule(module, **options)  # it always has a place for state

    def __call__(self, *args: Any, key: Any = None, method: str = "forward", **kwargs: Any) -> Any:
        call = self.model if method == "forward" else functools.partial(self.model.call, method)
        return call(*args, rngs=key, **kwargs)

    @property
    def weights(self) -> Weights:
        return Weights(
            self._by_torch_name(nnx.state(self.model, nnx.Param)),
            self._by_torch_name(nnx.state(self.model, torchleaf.nnx.Frozen)),
            self._by_torch_name(nnx.state(self.model, (nnx.BatchStat, torchleaf.nnx.Buffer))),
        )

    @property
    def skeleton(self) -> torch.nn.Module:
        return self.model._torch.module.skeleton

    def replaced(self, leaves: Leaves) -> Model:
        model = nnx.clone(self.model)
        nnx.update(model, unflatten_dict({tuple(name.split(".")): leaf for name, leaf in leaves.items()}))
        return self._with(model=model)

    def in_mode(self, *, training: bool) -> Model:
        model = nnx.clone(self.model)
        model.train() if training else model.eval()
        return self._with(model=model)

    def jit(self, program: Program) -> Callable[..., Any]:
        @nnx.jit
        def compiled(model: nnx.Module, inputs: Any) -> Any:
            return hide(program(self._with(model=model), *show(inputs)))

        return lambda *inputs: show(compiled(self.model, hide(inputs)))

    def gradients(self, loss: Program, *inputs: Any) -> Gradients:
        inexact, rest = eqx.partition(inputs, eqx.is_inexact_array)
        weights = nnx.DiffState(0, lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))

        @nnx.value_and_grad(argnums=(weights, 1), has_aux=True)
        def of(model: nnx.Module, inexact: Any) -> Any:
            value, aux = loss(self._with(model=model), *eqx.combine(inexact, rest))
            return value, hide(aux)

        (value, aux), (grads, input_grads) = of(self.model, inexact)
        grads = self._by_torch_name(grads)
        by_kind = (({name: grads[name] for name in leaves if name in grads}) for leaves in self.weights)
        return Gradients(value, show(aux), Weights(*by_kind), jax.tree.leaves(input_grads))

    def vmap(self, program: Program) -> Callable[..., Any]:
        @nnx.vmap(in_axes=(None, 0))
        def mapped(model: nnx.Module, inputs: Any) -> Any:
            return hide(program(self._with(model=model), *show(inputs)))

        return lambda *inputs: show(mapped(self.model, hide(inputs)))

    @classmethod
    def stack(cls, models: Sequence[Any]) -> Model:
        graphdef, _ = nnx.split(models[0].model)
        states = jax.tree.map(lambda *xs: jnp.stack(xs), *(nnx.state(m.model) for m in models))
        return models[0]._with(model=nnx.merge(graphdef, states))

    def vmap_members(self, program: Program, in_axes: int | None = None) -> Callable[..., Any]:
        @nnx.vmap(in_axes=(0, in_axes))
        def of(model: nnx.Module, inputs: Any) -> Any:
            return program(self._with(model=model), *inputs)

        return lambda *inputs: of(self.model, inputs)

    def trainer(self, optimizer: optax.GradientTransformation, loss: Program) -> Callable[..., jax.Array]:
        nnx_optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)

        @nnx.jit
        def update(model: nnx.Module, nnx_optimizer: nnx.Optimizer, inputs: Any) -> Any:
            value, grads = nnx.value_and_grad(lambda model: loss(self._with(model=model), *inputs))(model)
            nnx_optimizer.update(model, grads)
            return value

        return lambda *inputs: update(self.model, nnx_optimizer, inputs)

    def _held(self) -> tuple[Any, ...]:
        return (self.model,)

    def _loaded(self, loaded: Any) -> Model:
        return self._with(model=loaded)

    def _by_torch_name(self, state: nnx.State) -> Leaves:
        """Of several paths of a Variable, NNX gives the first in the alphabet, and torch the first in the module."""
        parameters = list(self.skeleton.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in reversed(parameters)}
        name_of = {name: first[id(p)] for name, p in parameters}
        paths = ((".".join(path), leaf) for path, leaf in nnx.to_flat_state(state))
        return {name_of.get(path, path): leaf[...] for path, leaf in paths}
