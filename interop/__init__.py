"""torch callables as JAX functions: arrays, calls, derivatives, batching, transport."""

from .errors import RandomnessError as RandomnessError
from .errors import StateError as StateError
from .errors import TorchCallError as TorchCallError
from .function import TorchFunction as TorchFunction
from .function import torch_function as torch_function
from .values.arrays import to_jax as to_jax
from .values.arrays import to_torch as to_torch
