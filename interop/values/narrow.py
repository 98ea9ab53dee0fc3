"""Results of 64 bits in a JAX that has 32: integers that do not fit are an error, as they are in `to_jax`.

The check is an op like any other, which a replay repeats. On a GPU it would wait for the stream, so there is none.
"""

import torch

from ..internals.fake import FakeTensor
from ..internals.transforms import is_wrapped, unwrapped, without_transforms


def narrowed(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A result in the dtype that JAX has for it; `RuntimeError` if it is an integer that does not fit."""
    if (tensor.dtype, dtype) == (torch.int64, torch.int32) and tensor.is_cpu:
        plain = _plain(tensor)
        if not isinstance(plain, FakeTensor):
            with without_transforms():
                torch.ops.aten._assert_async.msg(
                    (plain == plain.to(dtype)).all(),
                    f"{name} returns int64 values that do not fit int32, the widest integer JAX has here. Enable "
                    "64-bit types with `jax.config.update('jax_enable_x64', True)`, or return them as floats.",
                )
    return tensor.to(dtype)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The values of all examples, without the wrappers of `torch.func`."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor
