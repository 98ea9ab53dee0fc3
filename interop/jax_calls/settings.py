"""JAX's settings that a call was made with: its derivatives have them too, whenever and in whichever thread torch
computes those, which on a GPU is one of autograd's own."""

import contextlib
import operator
from typing import Any

import jax

_CONTEXTS = {
    "jax_enable_x64": jax.enable_x64,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_threefry_partitionable": jax.threefry_partitionable,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
}
"""What changes the numbers that a function gives, and the public context manager of each."""

Settings = tuple[Any, ...]
_values = operator.attrgetter(*_CONTEXTS)


def settings_here() -> Settings:
    """Those of this thread, now."""
    return _values(jax.config)


def entered(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """A context in which they hold again."""
    stack = contextlib.ExitStack()
    for context, now, wanted in zip(_CONTEXTS.values(), settings_here(), settings, strict=True):
        if now != wanted:
            stack.enter_context(context(wanted))
    return stack
