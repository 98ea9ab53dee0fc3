"""Where the cases are computed, and in which precision: on the CPU in float32, unless a program chooses otherwise."""

from typing import Any

import numpy as np
import torch

device, dtype = torch.device("cpu"), torch.float32


def choose(chosen_device: str, chosen_dtype: torch.dtype) -> None:
    """Set both, before a case is built."""
    global device, dtype
    device, dtype = torch.device(chosen_device), chosen_dtype


def tensor(array: np.ndarray) -> torch.Tensor:
    """An input for torch: floats in the precision chosen, integers as torch's default ones."""
    is_float = array.dtype == np.float32
    return torch.from_numpy(array).to(device, dtype if is_float else torch.int64)


def array(values: np.ndarray) -> Any:
    """The same for JAX, on its default device."""
    import jax.numpy as jnp

    found = jnp.asarray(values)
    return found.astype(str(dtype).removeprefix("torch.")) if found.dtype == jnp.float32 else found


def module(made: torch.nn.Module) -> torch.nn.Module:
    """A case's module where it is to run; cuDNN has no backward pass for recurrent layers in evaluation mode."""
    for part in made.modules():
        part.training |= isinstance(part, torch.nn.RNNBase) and device.type == "cuda"
    return made.to(device, dtype)


def numbers(result: Any) -> np.ndarray:
    """A result of either framework as float32."""
    if isinstance(result, torch.Tensor):
        return result.detach().float().cpu().numpy()
    return np.asarray(result.astype(np.float32))


def synchronise() -> None:
    """Wait for torch's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
