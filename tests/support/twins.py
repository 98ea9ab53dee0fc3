"""Functions written twice, in torch and in JAX, with arguments to call them on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf


@dataclass(frozen=True)
class Twin:
    """One function in both languages; `shapes` are those of its float32 arguments."""

    torch: Callable[..., Any]
    jax: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def ours(self) -> Callable[..., Any]:
        """The torch function as a JAX function."""
        return torchleaf.torch_function(self.torch, **self.options)

    def arguments(self, seed: int = 0, lead: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
        """Arguments drawn with `seed`; `lead` goes before each shape."""
        return normal(*(lead + shape for shape in self.shapes), seed=seed)


def normal(*shapes: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, ...]:
    """Standard normal float32 arrays."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def _layer_torch(x, w, b):
    return torch.tanh(x @ w.T + b)


def _layer_jax(x, w, b):
    return jnp.tanh(x @ w.T + b)


def _attention_torch(q, k, v):
    scores = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
    return (scores @ v).square()


def _attention_jax(q, k, v):
    scores = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0, -1)
    return jnp.square(scores @ v)


def _scalar_torch(x, y):
    return (torch.sin(x) * torch.exp(y)).sum() / (1 + x.square().sum())


def _scalar_jax(x, y):
    return (jnp.sin(x) * jnp.exp(y)).sum() / (1 + jnp.square(x).sum())


def _several_torch(x, y):
    # Outputs of different shapes; the last depends on y alone.
    return {"outer": torch.outer(x, y).cos(), "pair": (x * x.sum(), y.exp())}


def _several_jax(x, y):
    return {"outer": jnp.cos(jnp.outer(x, y)), "pair": (x * x.sum(), jnp.exp(y))}


LAYER = Twin(_layer_torch, _layer_jax, ((3,), (2, 3), (2,)))
ATTENTION = Twin(_attention_torch, _attention_jax, ((3, 2), (4, 2), (4, 2)))
SCALAR = Twin(_scalar_torch, _scalar_jax, ((4,), (4,)))
SEVERAL = Twin(_several_torch, _several_jax, ((2,), (3,)))


def total(function):
    """A scalar of what `function` returns, to take gradients of."""
    return lambda *args: jnp.sin(function(*args)).sum()


class Opaque(torch.autograd.Function):
    """`x**2 * y` with `ctx` in `forward`, which torch.func refuses, and a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x**2 * y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return 2 * x * y * grad, x**2 * grad
