"""How ranks and dtypes of operands are promoted: as in torch, whatever the user has JAX allow in his own code."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of JAX that may promote.

    Derivative rules need this for themselves: JAX runs them outside of the function that they belong to.

    Source: `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` of JAX's
    [configuration](https://docs.jax.dev/en/latest/config_options.html).
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run
