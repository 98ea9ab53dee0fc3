"""One interface to the `TorchModule` of each framework, in which the tests that run for all of them are written.

A `Model` is a wrapped torch module with its state, which calls update. It does everything as users of its framework do:
by the framework's own transformations, optimizers and ways to hold state.
"""

import pytest

from .equinox import EquinoxModel as EquinoxModel
from .linen import LinenModel as LinenModel
from .model import Model as Model
from .nnx import NNXModel as NNXModel

FRAMEWORKS: list[type[Model]] = [EquinoxModel, LinenModel, NNXModel]
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
eager_and_jit = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
