"""What must stay as it is while something runs, bit for bit."""

import contextlib
from typing import Any

import jax
import numpy as np
import torch
from module_reference import snapshot
from samples import raw_bytes


@contextlib.contextmanager
def unchanged(*trees: Any, torch_module: torch.nn.Module | None = None):
    """The bytes of the arrays of these pytrees, and a torch module's weights, modes and attributes, stay the same."""
    arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array | np.ndarray)]

    def state():
        return [raw_bytes(x) for x in arrays], torch_module and snapshot(torch_module)

    before = state()
    yield
    assert state() == before
