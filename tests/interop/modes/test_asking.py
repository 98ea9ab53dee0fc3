"""Code that asks whether a tensor requires gradients is heard wherever it lies, and through whatever passes it on."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close
from torch.overrides import TorchFunctionMode
from torchleaf.interop.modes import formulas, own_gradients

SITE = Path(torch.__file__).parents[1]
INTEROP = Path(own_gradients.__file__).parents[1]
USERS = {
    "a package beside torch": SITE / "torchvision" / "ops.py",
    "torchleaf": INTEROP.with_name("layers") / "module" / "gradient_hooks.py",
    "a console": "<stdin>",
}


class _PassingOn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "no mode": contextlib.nullcontext,
    "torch.device": lambda: torch.device("cpu"),
    "torchleaf's": lambda: formulas.Composed(formulas.WRONG),
    "a user's": _PassingOn,
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_user = pytest.mark.parametrize("file", USERS.values(), ids=USERS)

SOURCE = """
def tripled_where_required(x):
    y = x * 2
    with mode():
        asked = y.requires_grad
    if asked:
        y.register_hook(lambda g: 3 * g)
    return (y * y).sum()
"""


def _function(file, mode):
    namespace = {"mode": mode}
    exec(compile(SOURCE, str(file), "exec"), namespace)
    return namespace["tripled_where_required"]


@pytest.mark.all_cases
@each_mode
@each_user
def test_a_user(file, mode):
    with own_gradients.Asked() as asked:
        _function(file, mode)(torch.ones(3))
    assert asked.asked


@each_mode
def test_torch_itself(mode):
    with own_gradients.Asked() as asked:
        _function(SITE / "torch" / "nn" / "modules" / "rnn.py", mode)(torch.ones(3))
    assert not asked.asked


@pytest.mark.all_cases
@each_mode
@each_user
def test_gradients_are_torchs(file, mode):
    function = _function(file, mode)
    x = torch.arange(3.0, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x), x)
    assert_trees_close(jax.grad(torchleaf.torch_function(function))(jnp.arange(3.0)), torchleaf.to_jax(expected))
    with pytest.raises(torchleaf.TorchCallError, match="registers hooks on gradients"):
        jax.grad(torchleaf.torch_function(function, engine="xla"))(jnp.arange(3.0))
