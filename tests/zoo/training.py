"""One more check of a specimen: it trains as it does in torch, by an optimizer of either side."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torchleaf.interop.values.dtypes import is_inexact_tensor
from torchleaf.layers.check.bench import Bench
from torchleaf.layers.check.numbers import NotAskedError, compare, numpy_of_tensors
from torchleaf.layers.check.torch_side import Torch

STEPS, RATE = 3, 1e-2


def training(bench: Bench) -> float:
    """Losses and parameters over steps of gradient descent, with state where the module has any."""
    torch_side, ours = bench.torch(), bench.ours()
    if not torch_side.parameters:
        raise NotAskedError("no parameters")
    optimizer = optax.sgd(RATE)

    @eqx.filter_jit
    def step(params: Any, state: Any, arrays: Any, static: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, new = ours.call(params, arrays, static, state)
            return _mean_square(outputs), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        grads = jax.tree.map(jnp.conj, grads)  # optax asks for it where parameters are complex
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), state, value

    params, state, losses = ours.params, ours.state, []
    for number in range(STEPS):
        params, state, loss = step(params, state, *ours.arguments(number))
        losses.append(loss)
    error = compare(losses, [np.array(x) for x in _torch_losses(bench, torch_side)], "losses")
    names = list(torch_side.parameters)
    return max(error, compare(params, numpy_of_tensors(torch_side.parameters.values()), "parameters", names=names))


def _torch_losses(bench: Bench, side: Torch) -> list[float]:
    """The losses of steps of gradient descent in torch.

    Arguments require no gradients, as in JAX, where only parameters are differentiated by: some modules ask.
    """
    optimizer, losses = torch.optim.SGD(side.parameters.values(), RATE), []
    for number in range(STEPS):
        outputs = filter(is_inexact_tensor, side.outputs(bench.subject.arguments(number)))
        loss = sum(((y.abs() ** 2).mean() for y in outputs), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _mean_square(outputs: list[Any]) -> Any:
    """The same loss in JAX."""
    return sum((jnp.mean(jnp.abs(y) ** 2) for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)), jnp.zeros(()))
