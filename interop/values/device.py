"""Where a torch call will run, as far as can be known while it is traced."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import torch
from jax.core import Tracer

from ..internals.jax import another_cpu
from ..process.nesting import Devices

_CPU = torch.device("cpu")
CPUS = Devices(lambda: jax.local_devices(backend="cpu")[0], another_cpu)
"""Where tensors on the CPU are for JAX, also where its default device is another; for each depth (`nesting.py`)."""


def device_here(operands: Iterable[Any]) -> torch.device:
    """The device of the first operand that has one; else, for values that are traced, JAX's default device.

    XLA decides in the end. A trace on the other kind of device finds the same shapes, but fails where the callable
    has tensors of its own on this one.
    """
    for x in operands:
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            return torch_device(next(iter(x.devices())))
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is not None and not isinstance(default, str):
        return torch_device(default)
    platform = default or jax.default_backend()
    return torch.device("cuda", 0) if platform in ("gpu", "cuda") and _has_cuda() else _CPU


def torch_device(device: Any) -> torch.device:
    """torch's name for a device that both have; the CPU for others, through which their values go."""
    is_shared = device.platform == "gpu" and _has_cuda()
    return torch.device("cuda", device.local_hardware_id) if is_shared else _CPU


@functools.cache
def _has_cuda() -> bool:
    """Whether torch has GPUs at all: a torch that is built for CPUs computes on the host what JAX has on one."""
    return torch.cuda.is_available()
