"""What the tests of NVIDIA GPUs share."""

import contextlib
import warnings

import jax
import numpy as np
import torch

NEEDS_GPU = "needs a GPU that both JAX and torch see"


def on_gpu(x, index=0):
    """An array on one of JAX's GPUs."""
    return jax.device_put(x, jax.devices("gpu")[index])


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@contextlib.contextmanager
def synchronising_is_an_error():
    """Within it, torch raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cycles(seconds):
    """About so many for `torch.cuda._sleep`."""
    return int(seconds * 1.5e9)


def full_precision():
    """XLA would multiply float32 matrices in TF32, torch does not."""
    return jax.default_matmul_precision("highest")
