"""Models of JAX, of each framework, that are small and have what models have."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx

KEY = jax.random.key(0)


class Attention(eqx.Module):
    """An Equinox transformer block, for one sequence."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, use_output_bias=True, key=first)
        self.norms = [eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)]
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, x):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class LinenCNN(linen.Module):
    rate: float = 0.5

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3))(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(self.rate, deterministic=not train)(linen.relu(x))
        return linen.Dense(3)(x.mean((1, 2)))


class NNXCNN(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.head(x.mean((1, 2)))


def rnn(params, xs):
    def step(h, x):
        h = jnp.tanh(h @ params["hidden"] + x @ params["input"] + params["bias"])
        return h, h

    return jax.lax.scan(step, jnp.zeros(4, xs.dtype), xs)[0]


def rnn_params():
    shapes = {"hidden": (4, 4), "input": (8, 4), "bias": (4,)}
    return {name: jax.random.normal(KEY, shape) / 3 for name, shape in shapes.items()}
