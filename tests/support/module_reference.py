"""What torch itself computes with a module, as JAX arrays in JAX's conventions."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from compare import from_torch, repeatedly

eager_and_filter_jit = pytest.mark.parametrize(
    "jit", [lambda f: f, repeatedly(eqx.filter_jit)], ids=["eager", "filter_jit"]
)


def weighted_sum(output: Any) -> jax.Array:
    """A real scalar in which every element of the inexact leaves has a weight of its own."""
    leaves = [y.ravel() for y in jax.tree.leaves(output) if eqx.is_inexact_array(y)]
    return sum((jnp.real(_ramp(y.size).astype(y.dtype) @ y).astype(jnp.float32) for y in leaves), jnp.zeros(()))


def torch_weighted_sum(output: Any) -> torch.Tensor:
    """`weighted_sum` in torch."""
    leaves = [y.reshape(-1) for y in jax.tree.leaves(output) if _is_inexact(y)]
    ramps = [torch.tensor(_ramp(y.numel()).tolist(), dtype=y.dtype, device=y.device) for y in leaves]
    return sum((torch.dot(ramp, y).real.float() for ramp, y in zip(ramps, leaves, strict=True)), torch.zeros(()))


def torch_gradients_of(
    function: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Gradients of `torch_weighted_sum(function(*args, **kwargs))`.

    Returns those of the module's parameters that require grad, by name, and those of the inexact arguments, in order.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    leaves = [x.clone().requires_grad_() if _is_inexact(x) else x for x in leaves]
    given = [x.clone() if _is_inexact(x) else x for x in leaves]  # modules may write into their arguments
    args, kwargs = jax.tree.unflatten(treedef, given)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = [*params.values(), *(x for x in leaves if _is_inexact(x))]
    grads = torch.autograd.grad(torch_weighted_sum(function(*args, **kwargs)), wanted, allow_unused=True)
    converted = [from_torch(torch.zeros_like(x) if g is None else g.conj()) for x, g in zip(wanted, grads, strict=True)]
    return dict(zip(params, converted, strict=False)), converted[len(params) :]


def snapshot(module: torch.nn.Module) -> dict[str, Any]:
    """What must not change when a module is wrapped and used: weights' identities and bits, modes, attributes."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {
        "bits": {name: t.detach().reshape(-1).view(torch.uint8).tolist() for name, t in tensors},
        "tensors": {name: (id(t), t.data_ptr(), t.stride(), t.requires_grad, t.grad, t.is_leaf) for name, t in tensors},
        "modules": {name: (id(m), m.training, sorted(vars(m))) for name, m in module.named_modules()},
    }


def _ramp(n: int) -> jax.Array:
    """Weights that differ from each other and do not favour a direction."""
    return jnp.cos(1 + math.sqrt(2) * jnp.arange(n)).astype(jnp.float32)


def _is_inexact(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
