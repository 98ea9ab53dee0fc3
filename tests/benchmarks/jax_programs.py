"""What each kind of case computes, written in JAX around `apply(params, *inputs)`.

A contender in JAX is a way to make `apply` of a torch module; `params` is a dict from torch's names to arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import place
import torch
from cases import Case, Task
from steps import Step

Params = dict[str, jax.Array]
Apply = Callable[..., jax.Array]
Wrap = Callable[[Case, torch.nn.Module], Apply]
Hessian = Callable[[Callable[..., Any]], Callable[..., Any]]

jax.devices()  # start the backend: its memory is no contender's


def step(case: Case, task: Task, wrap: Wrap, hessian: Hessian = jax.hessian, params: Params | None = None) -> Step:
    """`hessian` is the contender's way to second derivatives, where `jax.hessian` is not; `params` are the contender's
    own, where it has some."""
    inputs, target = case.data()
    function = jax.jit(_program(case, task, wrap(case, case.module()), hessian))
    args = (params or _params(case), *map(place.array, (target, *inputs)))
    return Step(
        lambda: function(*args),
        jax.block_until_ready,
        lambda result: {name: place.numbers(x) for name, x in result.items()},
    )


def _params(case: Case) -> Params:
    modules = case.members() if case.kind == "ensemble" else [case.module()]
    weights = [{n: p.detach().numpy() for n, p in module.named_parameters()} for module in modules]
    if case.kind == "ensemble":
        return {n: place.array(np.stack([member[n] for member in weights])) for n in weights[0]}
    return {n: place.array(p) for n, p in weights[0].items()}


def _program(case: Case, task: Task, apply: Apply, hessian: Hessian) -> Callable[..., dict[str, jax.Array]]:
    """A function of `(params, target, *inputs)`."""
    if case.kind == "hessian":
        return lambda params, target, x: {"hessian": hessian(lambda x: apply(params, x)[0])(x)}
    if case.kind == "per_example":
        gradient = jax.grad(lambda params, target, *xs: _mse(apply(params, *xs), target))
        batched = jax.vmap(gradient, (None, 0, *(0 for _ in case.inputs)))
        return lambda params, target, *xs: _named(batched(params, target, *xs))
    forward = _forward(case, apply)
    if task == "inference":
        return lambda params, target, *xs: {"output": forward(params, *xs)}
    value_and_grad = jax.value_and_grad(lambda params, target, *xs: _mse(forward(params, *xs), target))

    def program(params: Params, target: jax.Array, *xs: jax.Array) -> dict[str, jax.Array]:
        loss, grads = value_and_grad(params, target, *xs)
        return {"loss": loss, **_named(grads)}

    return program


def _forward(case: Case, apply: Apply) -> Apply:
    if case.kind == "batched":
        return jax.vmap(apply, (None, *(0 for _ in case.inputs)))
    if case.kind == "ensemble":
        return jax.vmap(apply, (0, *(None for _ in case.inputs)))
    if case.kind == "scan":
        return lambda params, xs, initial: jax.lax.scan(lambda h, x: (apply(params, x, h), None), initial, xs)[0]
    return apply


def _mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((prediction - target) ** 2)


def _named(grads: Params) -> Params:
    return {f"grad {name}": g for name, g in grads.items()}
