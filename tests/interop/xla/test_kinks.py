"""Derivatives at the edges where a function has several: torch's choice, in reverse and in forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, torch_gradients

pytestmark = pytest.mark.all_cases
EDGES = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 3.0, 6.0])

FUNCTIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.0, -1.0),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "abs": torch.abs,
    "sign": lambda x: torch.sign(x) * x,
    "clamp": lambda x: torch.clamp(x, -1.0, 1.0),
    "clamp by tensors": lambda x: torch.clamp(x, torch.full_like(x, -0.5), x.detach().clamp(max=1.0)),
    "clamp by numbers, then by tensors": lambda x: x.clamp(-1.0).clamp(max=1.0) + x.clamp(max=x.detach() * 0 + 1),
    "clamp by equal tensors": lambda x: torch.clamp(x, torch.zeros_like(x), torch.zeros_like(x)),
    "clamp by tensors, the lower one above": lambda x: torch.clamp(x, x * 0 + 1, x * 0 - 1),
    "clamp by tensors of its own": lambda x: torch.clamp(x, x.flip(0) * 0 - 0.5, x * 0 + 1),
    "maximum with ties": lambda x: torch.maximum(x, x.flip(0)) + torch.maximum(x, torch.zeros_like(x)),
    "minimum with ties": lambda x: torch.minimum(x, torch.zeros_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x) * x),
    "fmin": lambda x: torch.fmin(x, x * 0),
    "amax with ties": lambda x: torch.cat([x, x]).amax(),
    "max with ties": lambda x: torch.cat([x, x]).max(),
    "max along an axis": lambda x: torch.stack([x, x]).max(0).values,
    "amin with ties": lambda x: torch.cat([x, x]).amin(),
    "norm at zero": lambda x: (x * 0).norm() + x.norm(),
    "norm of order one": lambda x: x.norm(1),
    "norm of order three": lambda x: torch.linalg.vector_norm(x, 3),
    "largest norm": lambda x: torch.linalg.vector_norm(x, float("inf")),
    "std at zero": lambda x: (x * 0).std(),
    "power of zero": lambda x: x**2 + x.abs() ** 1.5 + x**0,
    "exponent at zero": lambda x: torch.zeros_like(x) ** x.abs(),
    "atan2 at the origin": lambda x: torch.atan2(x * 0, x * 0),
    "xlogy at zero": lambda x: torch.xlogy(x.abs() * 0, x.abs() + 1),
    "prod with zeros": torch.prod,
    "cumprod with zeros": lambda x: torch.cumprod(x, 0),
    "max pooling with ties": lambda x: F.max_pool1d(torch.stack([x, x], -1).flatten()[None, None], 2),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x)),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
    "l1": lambda x: F.l1_loss(x, torch.zeros_like(x)),
    "softplus": lambda x: F.softplus(10 * x),
    "cdist of equal points": lambda x: torch.cdist(x[:, None], x[:, None]),
    "sinc": torch.sinc,
    "logsigmoid": F.logsigmoid,
    "median with ties": lambda x: torch.cat([x, x]).median(),
    "sort with ties": lambda x: torch.sort(torch.cat([x, x]), stable=True).values * torch.arange(18.0),
    "topk": lambda x: torch.topk(x, 3).values,
    "cosine similarity": lambda x: F.cosine_similarity(x, 2 * x.flip(0), dim=0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_torchs(name):
    fn = FUNCTIONS[name]

    def weighted(sum_of):
        return lambda y: sum_of(y * np.linspace(0.3, 1.7, y.shape[-1] if y.ndim else 1, dtype=np.float32).squeeze())

    def loss_in_torch(x):
        y = fn(x)
        return (y * torch.linspace(0.3, 1.7, y.shape[-1] if y.ndim else 1).squeeze()).sum()

    ours = torchleaf.torch_function(fn, engine="xla", strict=True)
    assert_trees_close(ours(EDGES), jnp.asarray(fn(torch.from_numpy(np.array(EDGES))).numpy()), rtol=1e-5)

    def loss(x):
        return weighted(jnp.sum)(ours(x))

    (expected,) = torch_gradients(loss_in_torch, EDGES)
    assert_trees_close(jax.grad(loss)(EDGES), expected, rtol=1e-5)
    direction = jnp.linspace(-1, 2, EDGES.size)
    assert_trees_close(jax.jvp(loss, (EDGES,), (direction,))[1], expected @ direction, rtol=1e-4, atol=1e-5)


def test_sqrt_at_zero_has_an_infinite_derivative():
    ours = torchleaf.torch_function(torch.sqrt, engine="xla")
    assert jax.grad(ours)(0.0 * jnp.ones(())) == jnp.inf
