"""PyTorch modules as first-class modules of JAX."""

import importlib
import typing

from .interop import JaxCallError as JaxCallError
from .interop import RandomnessError as RandomnessError
from .interop import StateError as StateError
from .interop import TorchCallError as TorchCallError
from .interop import jax_function as jax_function
from .interop import to_jax as to_jax
from .interop import to_torch as to_torch
from .interop import torch_function as torch_function
from .interop.doctor.doctor import doctor as doctor
from .layers import aliases
from .layers import equinox as equinox
from .layers.check import check as check
from .layers.equinox import TorchModule as TorchModule
from .layers.equinox_tools import stack as stack
from .layers.equinox_tools import trainable as trainable
from .layers.jax_module.module import JaxModule as JaxModule
from .layers.jax_module.module import to_jax_model as to_jax_model
from .layers.module.weights import load_state_dict as load_state_dict
from .layers.module.weights import state_dict as state_dict
from .layers.module.weights import to_torch_module as to_torch_module

if typing.TYPE_CHECKING:
    from .layers import linen as linen
    from .layers import nnx as nnx

__version__ = "0.2.0"

aliases.install()


def __getattr__(name: str) -> typing.Any:
    if name in aliases.FRAMEWORKS:  # Flax is imported by those who use it
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
