"""torch callables as JAX functions and back: arrays, calls, derivatives, batching, transport."""

from .errors import RandomnessError as RandomnessError
from .errors import StateError as StateError
from .errors import TorchCallError as TorchCallError
from .function import TorchFunction as TorchFunction
from .function import torch_function as torch_function
from .jax_calls.errors import JaxCallError as JaxCallError
from .jax_function import jax_function as jax_function
from .values.arrays import to_jax as to_jax
from .values.arrays import to_torch as to_torch
