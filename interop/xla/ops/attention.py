"""Fused attention, for code that calls an op of one kernel; `scaled_dot_product_attention` comes as its parts."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..dtypes import opmath
from ..table import op


def _attention(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> tuple[Any, Any]:
    """The result, and the logarithms of the sums of exponentials."""
    dtype = opmath(q.dtype)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    scores = q @ jnp.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == jnp.bool_ else scores + mask
    empty = jnp.all(scores == -jnp.inf, -1, keepdims=True)
    weights = jnp.where(empty, 0, jax.nn.softmax(jnp.where(empty, 0, scores), -1))
    return weights @ v, jax.nn.logsumexp(scores, -1)


@op("_scaled_dot_product_flash_attention_for_cpu")
def flash_attention_for_cpu(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    """The kernel for CPUs, which has no dropout."""
    return _attention(q, k, v, attn_mask, is_causal, scale)
