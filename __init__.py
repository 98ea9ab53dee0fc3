"""PyTorch modules as first-class modules of JAX."""

from .interop import RandomnessError as RandomnessError
from .interop import StateError as StateError
from .interop import TorchCallError as TorchCallError
from .interop import to_jax as to_jax
from .interop import to_torch as to_torch
from .interop import torch_function as torch_function
from .layers import equinox as equinox
from .layers.equinox import TorchModule as TorchModule
from .layers.weights import load_state_dict as load_state_dict
from .layers.weights import stack as stack
from .layers.weights import state_dict as state_dict
from .layers.weights import to_torch_module as to_torch_module
from .layers.weights import trainable as trainable
