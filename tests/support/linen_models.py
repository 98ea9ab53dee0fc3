"""Linen models of torch modules: one with every kind of weight, and variables by torch's names."""

import jax
import jax.numpy as jnp
import torch
from flax.traverse_util import flatten_dict
from torch import nn


def mixed() -> nn.Module:
    """Trainable and frozen parameters, statistics that are not the initial ones, dropout; in training mode."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    with torch.no_grad():
        module(torch.randn(8, 3))
    module[0].requires_grad_(False)
    return module


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def by_torch_name(variables) -> dict[str, jax.Array]:
    return {".".join(path[1:]): leaf for path, leaf in flatten_dict(variables).items()}


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
