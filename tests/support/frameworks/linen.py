"""`torchleaf.linen.TorchModule` as users of Linen use it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import torch
import torchleaf
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

from .model import Gradients, Leaves, Model, Program, Weights, hide, present, show


class LinenModel(Model):
    name = "linen"
    key_remedy = 'Pass `rngs={"dropout": key}` to `apply`'
    state_remedy = r"apply\(\.\.\., mutable=\[.*train=False"

    def __init__(self, module: torch.nn.Module, *, with_state: bool = False, copy: bool = False, **options: Any):
        self.module = torchleaf.linen.TorchModule(module, copy_weights=copy, **options)
        self.variables = self.module.init(jax.random.key(0), method=lambda module: module.setup())
        self.mutable = sorted(self.variables.keys() & {"batch_stats", "buffers"}) if with_state else False

    def __call__(self, *args: Any, key: Any = None, method: str = "forward", **kwargs: Any) -> Any:
        named = {} if method == "forward" else {"method": method}
        rngs = {} if key is None else {"rngs": {"dropout": key}}
        output = self.module.apply(self.variables, *args, mutable=self.mutable, **named, **rngs, **kwargs)
        if self.mutable is False:
            return output
        output, updates = output
        self.variables = {**self.variables, **updates}
        return output

    @property
    def weights(self) -> Weights:
        return _linen_weights(self.variables)

    @property
    def skeleton(self) -> torch.nn.Module:
        return self.module.made.module.skeleton

    def replaced(self, leaves: Leaves) -> Model:
        flat = flatten_dict(self.variables)
        return self._with(variables=unflatten_dict({p: leaves.get(".".join(p[1:]), v) for p, v in flat.items()}))

    def in_mode(self, *, training: bool) -> Model:
        return self._with(module=self.module.clone(train=training))

    def jit(self, program: Program) -> Callable[..., Any]:
        @jax.jit
        def compiled(variables: Any, inputs: Any) -> Any:
            inner = self._with(variables=variables)
            return hide(program(inner, *show(inputs))), inner.variables

        def run(*inputs: Any) -> Any:
            output, self.variables = compiled(self.variables, hide(inputs))
            return show(output)

        return run

    def gradients(self, loss: Program, *inputs: Any) -> Gradients:
        inexact, rest = eqx.partition((self.variables, inputs), eqx.is_inexact_array)

        @functools.partial(jax.value_and_grad, has_aux=True)
        def of(inexact: Any) -> Any:
            variables, inputs = eqx.combine(inexact, rest)
            inner = self._with(variables=variables)
            value, aux = loss(inner, *inputs)
            return value, (hide(aux), inner.variables)

        (value, (aux, self.variables)), (grads, input_grads) = of(inexact)
        weights = Weights(*map(present, _linen_weights(grads)))
        return Gradients(value, show(aux), weights, jax.tree.leaves(input_grads))

    def vmap(self, program: Program) -> Callable[..., Any]:
        mapped = jax.vmap(lambda inputs: hide(program(self._with(), *show(inputs))))
        return lambda *inputs: show(mapped(hide(inputs)))

    @classmethod
    def stack(cls, models: Sequence[Any]) -> Model:
        return models[0]._with(variables=jax.tree.map(lambda *xs: jnp.stack(xs), *(m.variables for m in models)))

    def vmap_members(self, program: Program, in_axes: int | None = None) -> Callable[..., Any]:
        @functools.partial(jax.vmap, in_axes=(0, in_axes))
        def of(variables: Any, inputs: Any) -> Any:
            inner = self._with(variables=variables)
            return program(inner, *inputs), inner.variables

        def run(*inputs: Any) -> Any:
            output, self.variables = of(self.variables, inputs)
            return output

        return run

    def trainer(self, optimizer: optax.GradientTransformation, loss: Program) -> Callable[..., jax.Array]:
        train_state = TrainState.create(apply_fn=self.module.apply, params=self.variables["params"], tx=optimizer)

        @jax.jit
        def update(train_state: TrainState, variables: Any, inputs: Any) -> Any:
            @functools.partial(jax.value_and_grad, has_aux=True)
            def of(params: Any) -> Any:
                inner = self._with(variables={**variables, "params": params})
                return loss(inner, *inputs), inner.variables

            (value, variables), grads = of(train_state.params)
            return value, train_state.apply_gradients(grads=grads), variables

        def step(*inputs: Any) -> jax.Array:
            nonlocal train_state
            value, train_state, variables = update(train_state, self.variables, inputs)
            self.variables = {**variables, "params": train_state.params}
            return value

        return step

    def _held(self) -> tuple[Any, ...]:
        return self.module, self.variables

    def _loaded(self, loaded: Any) -> Model:
        return self._with(variables=loaded)


def _linen_weights(variables: Any) -> Weights:
    collections = (flatten_dict(variables.get(c, {}), sep=".") for c in ("params", "frozen", "batch_stats", "buffers"))
    params, frozen, statistics, buffers = collections
    return Weights(params, frozen, {**statistics, **buffers})
