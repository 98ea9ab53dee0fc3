"""The same models written in JAX over torch's weights: XLA computes everything. The longest models are left out."""

from functools import partial

import jax
import jax.numpy as jnp
import jax_programs
import torch
from cases import Case, Task
from jax import lax
from jax_programs import Params
from steps import Step


def build(case: Case, task: Task) -> Step:
    return jax_programs.step(case, task, _wrap)


def _wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
    if case.name not in _MODELS:
        raise NotImplementedError("not written in JAX here")
    return _MODELS[case.name]


def _linear(p: Params, x: jax.Array, name: str = "") -> jax.Array:
    return x @ p[f"{name}weight"].T + p[f"{name}bias"]


def _mlp(p: Params, x: jax.Array, activation=jax.nn.relu) -> jax.Array:
    x = activation(_linear(p, x, "0."))
    x = activation(_linear(p, x, "2."))
    return _linear(p, x, "4.")


def _tanh_mlp(p: Params, x: jax.Array) -> jax.Array:
    return _mlp(p, x, jnp.tanh)


def _gru_cell(p: Params, x: jax.Array, h: jax.Array) -> jax.Array:
    reset_x, update_x, new_x = jnp.split(x @ p["weight_ih"].T + p["bias_ih"], 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(h @ p["weight_hh"].T + p["bias_hh"], 3, axis=-1)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return (1 - update) * new + update * h


def _lstm(p: Params, x: jax.Array) -> jax.Array:
    def cell(carry: tuple[jax.Array, jax.Array], projected: jax.Array):
        h, c = carry
        i, f, g, o = jnp.split(projected + h @ p["layer.weight_hh_l0"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    projected = x @ p["layer.weight_ih_l0"].T + p["layer.bias_ih_l0"] + p["layer.bias_hh_l0"]
    zeros = jnp.zeros((x.shape[0], p["layer.weight_hh_l0"].shape[1]), x.dtype)
    return lax.scan(cell, (zeros, zeros), projected.swapaxes(0, 1))[1].swapaxes(0, 1)


def _cnn(p: Params, x: jax.Array) -> jax.Array:
    x = x[None]
    for name in ("0.", "3."):
        x = lax.conv_general_dilated(x, p[f"{name}weight"], (1, 1), "SAME") + p[f"{name}bias"][:, None, None]
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return _linear(p, x.ravel(), "7.")


def _resnet18(p: Params, x: jax.Array) -> jax.Array:
    """With running statistics as they are at first: means of zero and variances of one."""

    def layer(x: jax.Array, conv: str, norm: str, stride: int = 1) -> jax.Array:
        kernel = p[f"{conv}.weight"]
        pad = [(n // 2, n // 2) for n in kernel.shape[2:]]
        x = lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NCHW", "OIHW", "NCHW"))
        scale = p[f"{norm}.weight"] * (1 + 1e-5) ** -0.5
        return x * scale[:, None, None] + p[f"{norm}.bias"][:, None, None]

    x = jax.nn.relu(layer(x, "stem.0", "stem.1"))
    for i in range(8):
        name, stride = f"blocks.{i}", 2 if i in (2, 4, 6) else 1
        y = jax.nn.relu(layer(x, f"{name}.conv1", f"{name}.norm1", stride))
        y = layer(y, f"{name}.conv2", f"{name}.norm2")
        x = layer(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride) if stride == 2 else x
        x = jax.nn.relu(x + y)
    return _linear(p, x.mean((2, 3)), "head.")


def _layer_norm(p: Params, x: jax.Array, name: str) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * p[f"{name}weight"] + p[f"{name}bias"]


def _transformer(p: Params, x: jax.Array, layers: int = 4, heads: int = 8) -> jax.Array:
    for name in (f"layers.{i}." for i in range(layers)):
        attention = f"{name}self_attn."
        projected = x @ p[f"{attention}in_proj_weight"].T + p[f"{attention}in_proj_bias"]
        query, key, value = (part.reshape(*x.shape[:-1], heads, -1) for part in jnp.split(projected, 3, axis=-1))
        attended = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x = _layer_norm(p, x + _linear(p, attended, f"{attention}out_proj."), f"{name}norm1.")
        hidden = jax.nn.relu(_linear(p, x, f"{name}linear1."))
        x = _layer_norm(p, x + _linear(p, hidden, f"{name}linear2."), f"{name}norm2.")
    return x


_MODELS: dict[str, jax_programs.Apply] = {
    "linear": _linear,
    "mlp": _mlp,
    "lstm": _lstm,
    "transformer": _transformer,
    "transformer_large": partial(_transformer, layers=12, heads=12),
    "resnet18": _resnet18,
    "resnet18_large": _resnet18,
    "grad_vmap_linear": _linear,
    "grad_vmap_cnn": _cnn,
    "per_example": _mlp,
    "hessian": _tanh_mlp,
    "scan": _gru_cell,
    "ensemble": _mlp,
}
