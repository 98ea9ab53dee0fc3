"""The value of a tensor that was written into past torch's autograd, as by `torch.no_grad` or `x.data`."""

from typing import Any

import jax


@jax.custom_jvp
def in_place_of(old: Any, new: Any) -> Any:
    """A value with the derivative of another one."""
    return new


@in_place_of.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
