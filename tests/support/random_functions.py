"""Torch functions that draw random numbers, each of 24 positive numbers: one for every way torch has to draw."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
import torchleaf
from torch import distributions


@dataclass(frozen=True)
class Sampler:
    """A function of a tensor of shape (24,) that draws."""

    function: Callable[[torch.Tensor], torch.Tensor]
    loops: bool = False
    """Whether vmap over arguments and keys runs as a loop, with a warning."""
    masks: bool = False
    """Whether it sets random elements to zero, and their gradients with them."""
    smooth: bool = False
    """Whether it has a derivative by its argument, for one key."""

    def __call__(self, **options: object) -> Callable[..., jax.Array]:
        """The function as a JAX function."""
        return torchleaf.torch_function(self.function, **options)


def image(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 3, 2, 2)


def _attention(x: torch.Tensor) -> torch.Tensor:
    q = x.reshape(1, 2, 4, 3)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


def _rand_out(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(4, out=torch.empty(4)) + x[:4]


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(4, 6).t().normal_() * x.reshape(6, 4)


def _categorical(x: torch.Tensor) -> torch.Tensor:
    return distributions.Categorical(x.reshape(4, 6), validate_args=False).sample((5,))


def _gaussian(x: torch.Tensor) -> torch.Tensor:
    scale = torch.diag_embed(x[:3])
    return distributions.MultivariateNormal(x[3:6], scale_tril=scale, validate_args=False).rsample((2,))


SAMPLERS = {
    "dropout": Sampler(F.dropout, masks=True),
    "dropout-all": Sampler(lambda x: F.dropout(x, 1.0) + torch.rand(24)),
    "dropout1d": Sampler(lambda x: F.dropout1d(x.reshape(2, 3, 4)), masks=True),
    "dropout2d": Sampler(lambda x: F.dropout2d(image(x)), masks=True),
    "dropout3d": Sampler(lambda x: F.dropout3d(x.reshape(1, 6, 1, 2, 2)), masks=True),
    "dropout-inplace": Sampler(lambda x: F.dropout(2 * x, inplace=True), masks=True),
    "native_dropout": Sampler(lambda x: torch.native_dropout(x, 0.25, True)[0], masks=True),
    "alpha_dropout": Sampler(lambda x: F.alpha_dropout(x, training=True), smooth=True),
    "feature_alpha_dropout": Sampler(lambda x: F.feature_alpha_dropout(image(x), training=True), smooth=True),
    "attention": Sampler(_attention, smooth=True),
    "rrelu": Sampler(lambda x: F.rrelu(-x, training=True), loops=True, smooth=True),
    "fractional_max_pool": Sampler(
        lambda x: F.fractional_max_pool2d(x.reshape(1, 4, 6), 2, output_size=(3, 4)), loops=True, smooth=True
    ),
    "rand": Sampler(lambda x: x * torch.rand(24), smooth=True),
    "rand-out": Sampler(_rand_out, loops=True, smooth=True),
    "rand_like": Sampler(lambda x: x * torch.rand_like(x), smooth=True),
    "randn": Sampler(lambda x: x * torch.randn(24), smooth=True),
    "randn-bfloat16": Sampler(lambda x: x.bfloat16() * torch.randn(24, dtype=torch.bfloat16)),
    "randn-complex": Sampler(lambda x: x * torch.randn(24, dtype=torch.complex64)),
    "randint": Sampler(lambda x: x + torch.randint(0, 1000, (24,))),
    "randint_like": Sampler(lambda x: torch.randint_like(x, 5, 1000)),
    "randperm": Sampler(lambda x: x[torch.randperm(24)], loops=True, smooth=True),
    "normal": Sampler(lambda x: torch.normal(x, 2.0)),
    "normal-tensors": Sampler(lambda x: torch.normal(x, x)),
    "bernoulli": Sampler(lambda x: torch.bernoulli(x.clamp(0.1, 0.9))),
    "bernoulli_-rates": Sampler(lambda x: torch.zeros_like(x).bernoulli_(x.clamp(0.1, 0.9))),
    "multinomial": Sampler(lambda x: x.multinomial(12), loops=True),
    "poisson": Sampler(lambda x: torch.poisson(100 * x)),
    "binomial": Sampler(lambda x: torch.binomial(1000 * torch.ones_like(x), x.clamp(0.1, 0.9))),
    "normal_": Sampler(lambda x: x * torch.empty_like(x).normal_(), smooth=True),
    "normal_-transposed": Sampler(_transposed, loops=True, smooth=True),
    "uniform_": Sampler(lambda x: x * torch.zeros_like(x).uniform_(1, 2), smooth=True),
    "exponential_": Sampler(lambda x: x * torch.zeros_like(x).exponential_(), smooth=True),
    "cauchy_": Sampler(lambda x: torch.zeros_like(x).cauchy_()),
    "log_normal_": Sampler(lambda x: torch.zeros_like(x).log_normal_()),
    "geometric_": Sampler(lambda x: torch.zeros_like(x).geometric_(0.01)),
    "random_": Sampler(lambda x: torch.zeros_like(x).random_(5, 1000)),
    "gumbel_softmax": Sampler(lambda x: F.gumbel_softmax(x.reshape(4, 6)), smooth=True),
    "Normal": Sampler(lambda x: distributions.Normal(x, x, validate_args=False).rsample(), loops=True, smooth=True),
    "Gamma": Sampler(lambda x: distributions.Gamma(x, x, validate_args=False).rsample(), loops=True, smooth=True),
    "Beta": Sampler(lambda x: distributions.Beta(x, x, validate_args=False).rsample(), loops=True, smooth=True),
    "Dirichlet": Sampler(
        lambda x: distributions.Dirichlet(x.reshape(4, 6), validate_args=False).rsample(), loops=True, smooth=True
    ),
    "MultivariateNormal": Sampler(_gaussian, loops=True, smooth=True),
    "Categorical": Sampler(_categorical, loops=True),
    "own-generator": Sampler(lambda x: torch.poisson(100 * x, generator=torch.Generator().manual_seed(7))),
}


def argument() -> jax.Array:
    """24 positive numbers that differ from each other."""
    return jnp.linspace(0.1, 0.9, 24) ** 2
