"""Random numbers: drawn from the key of the call by JAX's generators, distributed as torch's."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..dtypes import cast, category, opmath
from ..table import op


def _float(out: Any) -> Any:
    return opmath(out.dtype) if category(out.dtype) == 2 else jnp.float32


@op("rand", "rand_like")
def rand(*args: Any, out: Any, key: Any, **options: Any) -> Any:
    """Uniform in [0, 1)."""
    return jax.random.uniform(key, out.shape, _float(out))


@op("randn", "randn_like")
def randn(*args: Any, out: Any, key: Any, **options: Any) -> Any:
    """Standard normal; complex numbers of unit variance."""
    dtype = out.dtype if category(out.dtype) == 3 else _float(out)
    return jax.random.normal(key, out.shape, dtype)


@op("randint.default", "randint_like.default", "randint.generator")
def randint(*args: Any, out: Any, key: Any, **options: Any) -> Any:
    """Integers below a bound."""
    high = next(a for a in args if isinstance(a, int))
    return jax.random.randint(key, out.shape, 0, high)


@op("randint.low", "randint_like.low_dtype", "randint.low_generator")
def randint_between(*args: Any, out: Any, key: Any, **options: Any) -> Any:
    """Integers between two bounds."""
    low, high = [a for a in args if isinstance(a, int)][:2]
    return jax.random.randint(key, out.shape, low, high)


@op("random.from")
def random_between(x: Any, low: int, high: int | None = None, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Integers between two bounds, in a tensor's place."""
    return jax.random.randint(key, out.shape, low, 2**24 if high is None else high)


@op("random.to")
def random_below(x: Any, high: int, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Integers below a bound, in a tensor's place."""
    return jax.random.randint(key, out.shape, 0, high)


@op("randperm")
def randperm(n: int, *, out: Any, key: Any, **options: Any) -> Any:
    """The first integers in random order."""
    return jax.random.permutation(key, n)


@op("bernoulli.default")
def bernoulli(p: Any, *, generator: Any = None, key: Any) -> Any:
    """Ones with probabilities of their own."""
    return jax.random.bernoulli(key, jax.lax.stop_gradient(cast(p, opmath(p.dtype))), p.shape)


@op("bernoulli.p", "bernoulli.float", "bernoulli.Tensor")
def bernoulli_in_place(x: Any, p: Any = 0.5, *, generator: Any = None, key: Any) -> Any:
    """Ones with a probability, or with those of a tensor, in a tensor's place."""
    return jax.random.bernoulli(key, jax.lax.stop_gradient(jnp.asarray(p)), x.shape)


@op("native_dropout")
def native_dropout(x: Any, p: float, train: bool | None, *, key: Any) -> Any:
    """With numbers set to zero, the rest scaled; and which were kept."""
    if train is False or p == 0:
        return x, jnp.ones(x.shape, bool)
    kept = jax.random.bernoulli(key, 1 - p, x.shape)
    return jnp.where(kept, x * (0.0 if p == 1 else 1 / (1 - p)), 0), kept


@op("uniform")
def uniform(x: Any, low: float = 0, high: float = 1, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Uniform between bounds, in a tensor's place."""
    return jax.random.uniform(key, out.shape, _float(out), low, high)


@op("normal.default", "normal_functional")
def normal_in_place(x: Any, mean: float = 0, std: float = 1, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Normal, in a tensor's place."""
    return mean + std * randn(out=out, key=key)


@op("normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor", "normal.float_float")
def normal(mean: Any, std: Any = 1.0, *rest: Any, generator: Any = None, out: Any, key: Any, **options: Any) -> Any:
    """Normal, with means and deviations of their own."""
    return mean + std * randn(out=out, key=key)


@op("log_normal")
def log_normal(x: Any, mean: float = 1, std: float = 2, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Exponentials of normal numbers."""
    return jnp.exp(mean + std * randn(out=out, key=key))


@op("exponential")
def exponential(x: Any, rate: float = 1, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Exponential with a rate."""
    return jax.random.exponential(key, out.shape, _float(out)) / rate


@op("cauchy")
def cauchy(x: Any, median: float = 0, scale: float = 1, *, generator: Any = None, out: Any, key: Any) -> Any:
    """Cauchy's."""
    return median + scale * jax.random.cauchy(key, out.shape, _float(out))


@op("geometric")
def geometric(x: Any, p: float, *, generator: Any = None, out: Any, key: Any) -> Any:
    """How many trials it takes."""
    drawn = jax.random.uniform(key, out.shape, _float(out), minval=jnp.finfo(_float(out)).tiny)
    return jnp.ceil(jnp.log(drawn) / math.log1p(-p)).clip(1) if p < 1 else jnp.ones(out.shape)


@op("poisson")
def poisson(rate: Any, generator: Any = None, *, key: Any) -> Any:
    """Poisson's, which has no derivative."""
    wide = jax.lax.stop_gradient(cast(rate, opmath(rate.dtype)))
    key = key if "threefry" in str(jax.random.key_impl(key)) else jax.random.key(jax.random.bits(key))
    return jax.random.poisson(key, wide, rate.shape)


@op("_standard_gamma")
def gamma(shape: Any, generator: Any = None, *, key: Any) -> Any:
    """Gamma's, differentiated by its parameter."""
    return jax.random.gamma(key, cast(shape, opmath(shape.dtype)), shape.shape)


@op("_sample_dirichlet")
def dirichlet(concentration: Any, generator: Any = None, *, key: Any) -> Any:
    """Dirichlet's."""
    return jax.random.dirichlet(key, concentration, concentration.shape[:-1])


@op("binomial")
def binomial(count: Any, p: Any, generator: Any = None, *, key: Any) -> Any:
    """How many of so many succeed."""
    return jax.random.binomial(key, count, p, jnp.broadcast_arrays(count, p)[0].shape)


@op("multinomial")
def multinomial(weights: Any, count: int, replacement: bool = False, *, generator: Any = None, key: Any) -> Any:
    """Indices by weights, with or without putting them back."""
    logits = jnp.log(jax.lax.stop_gradient(weights))
    if replacement:
        drawn = jax.random.categorical(key, logits, axis=-1, shape=(count, *weights.shape[:-1]))
        return jnp.moveaxis(drawn, 0, -1)
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.lax.top_k(noisy, count)[1]
