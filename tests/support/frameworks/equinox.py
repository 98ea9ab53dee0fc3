"""`torchleaf.TorchModule` as users of Equinox use it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
import torch
import torchleaf

from .model import Gradients, Leaves, Model, Program, Weights, present


class EquinoxModel(Model):
    name = "equinox"
    key_remedy = "Pass `key=`"
    state_remedy = r"make_with_state.*eqx\.nn\.inference_mode"

    def __init__(self, module: torch.nn.Module, *, with_state: bool = False, **options: Any):
        wrap = functools.partial(torchleaf.TorchModule, **options)
        self.model, self.state = eqx.nn.make_with_state(wrap)(module) if with_state else (wrap(module), None)

    def __call__(self, *args: Any, key: Any = None, method: str = "forward", **kwargs: Any) -> Any:
        call = self.model if method == "forward" else functools.partial(self.model.call, method)
        if self.state is None:
            return call(*args, key=key, **kwargs)
        output, self.state = call(*args, key=key, state=self.state, **kwargs)
        return output

    @property
    def weights(self) -> Weights:
        return _equinox_weights(self.model, self.state)

    @property
    def skeleton(self) -> torch.nn.Module:
        return self.model.module.skeleton

    def replaced(self, leaves: Leaves) -> Model:
        params, frozen, buffers = ({k: leaves.get(k, v) for k, v in old.items()} for old in self.weights)
        model = eqx.tree_at(lambda m: (m.params, m.frozen), self.model, (params, frozen))
        state = jax.tree.map(lambda x: x, self.state)  # Equinox wants to be told that a state is used twice
        if buffers and not model.is_stateful():
            model = eqx.tree_at(lambda m: m.buffers, model, buffers)
        elif buffers:
            state = state.set(model.buffer_index, buffers)
        return self._with(model=model, state=state)

    def in_mode(self, *, training: bool) -> Model:
        return self._with(model=eqx.nn.inference_mode(self.model, value=not training))

    def jit(self, program: Program) -> Callable[..., Any]:
        @eqx.filter_jit
        def compiled(model: Any, state: Any, inputs: Any) -> Any:
            inner = self._with(model=model, state=state)
            return program(inner, *inputs), inner.state

        def run(*inputs: Any) -> Any:
            output, self.state = compiled(self.model, self.state, inputs)
            return output

        return run

    def gradients(self, loss: Program, *inputs: Any) -> Gradients:
        @functools.partial(eqx.filter_value_and_grad, has_aux=True)
        def of(differentiated: Any) -> Any:
            model, state, inputs = differentiated
            inner = self._with(model=model, state=state)
            value, aux = loss(inner, *inputs)
            return value, (aux, inner.state)

        (value, (aux, state)), grads = of((self.model, self.state, inputs))
        self.state, (model, grads_of_state, input_grads) = state, grads
        weights = Weights(*map(present, _equinox_weights(model, grads_of_state)))
        return Gradients(value, aux, weights, jax.tree.leaves(input_grads))

    def vmap(self, program: Program) -> Callable[..., Any]:
        return eqx.filter_vmap(lambda *inputs: program(self._with(), *inputs))

    @classmethod
    def stack(cls, models: Sequence[Any]) -> Model:
        first = models[0]
        state = None if first.state is None else torchleaf.stack([m.state for m in models])
        return first._with(model=torchleaf.stack([m.model for m in models]), state=state)

    def vmap_members(self, program: Program, in_axes: int | None = None) -> Callable[..., Any]:
        @functools.partial(eqx.filter_vmap, in_axes=(eqx.if_array(0), eqx.if_array(0), in_axes))
        def of(model: Any, state: Any, inputs: Any) -> Any:
            inner = self._with(model=model, state=state)
            return program(inner, *inputs), inner.state

        def run(*inputs: Any) -> Any:
            output, self.state = of(self.model, self.state, inputs)
            return output

        return run

    def trainer(self, optimizer: optax.GradientTransformation, loss: Program) -> Callable[..., jax.Array]:
        opt_state = optimizer.init(eqx.filter(self.model, torchleaf.trainable(self.model)))

        @eqx.filter_jit
        def update(model: Any, state: Any, opt_state: Any, inputs: Any) -> Any:
            params, static = eqx.partition(model, torchleaf.trainable(model))

            @functools.partial(jax.value_and_grad, has_aux=True)
            def of(params: Any) -> Any:
                inner = self._with(model=eqx.combine(params, static), state=state)
                return loss(inner, *inputs), inner.state

            (value, new_state), grads = of(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return value, eqx.apply_updates(model, updates), new_state, opt_state

        def step(*inputs: Any) -> jax.Array:
            nonlocal opt_state
            value, self.model, self.state, opt_state = update(self.model, self.state, opt_state, inputs)
            return value

        return step

    def _held(self) -> tuple[Any, ...]:
        return (self.model,) if self.state is None else (self.model, self.state)

    def _loaded(self, loaded: Any) -> Model:
        model, state = (loaded, None) if self.state is None else loaded
        return self._with(model=model, state=state)


def _equinox_weights(model: torchleaf.TorchModule, state: Any) -> Weights:
    buffers = model.buffers if state is None or model.buffer_index is None else state.get(model.buffer_index)
    return Weights(model.params, model.frozen, buffers)
