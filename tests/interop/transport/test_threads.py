"""On which thread a torch call runs and on how many cores; each case in a process of its own, for settings last."""

import json

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.long

_IMPORTS = """
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from torch import nn
"""

_RECORD = """
seen = []


def record(x):
    seen.append((threading.current_thread().name == "torchleaf", torch.get_num_threads()))
    return torch.tanh(x @ x)


function = torchleaf.torch_function(record, replay=False)
x = jnp.eye(SIZE)


def loss(x):
    return (function(jnp.sin(x)) ** 2).sum()  # XLA's ops around the call


def calls(step):
    del seen[:]
    for _ in range(3):
        jax.block_until_ready(step(x))
    return sorted(set(seen))


program = jax.jit(jax.value_and_grad(loss)).lower(x).compile()
"""

LONG, SHORT = 256, 8
"""Sizes of square matrices whose product is long, or short."""


def _printed(script: str) -> object:
    return json.loads(run_python(_IMPORTS + script))


def _recorded(size: int, n_threads: int | None, expression: str) -> object:
    """The value of `expression` after `program` is compiled with `n_threads` set."""
    setting = "" if n_threads is None else f"torch.set_num_threads({n_threads})"
    return _printed(f"{setting}\n{_RECORD.replace('SIZE', str(size))}\nprint(json.dumps({expression}))")


@pytest.mark.parametrize("n_threads", [2, 3, None], ids=["two", "three", "default"])
def test_long_calls_run_on_the_torch_thread_with_the_users_number_of_threads(n_threads):
    expression = "[torch.get_num_threads(), calls(program), calls(function), torch.get_num_threads()]"
    before, compiled, eager, after = _recorded(LONG, n_threads, expression)
    assert before == after == (n_threads or before)
    assert compiled == eager == [[before > 1, before]]


def test_the_number_of_threads_is_that_of_the_last_compilation():
    expression = "[calls(program), torch.set_num_threads(2), calls(jax.jit(loss)), calls(program)]"
    three, _, two, still_two = _recorded(LONG, 3, expression)
    assert [three, two, still_two] == [[[True, 3]], [[True, 2]], [[True, 2]]]


@pytest.mark.parametrize("size", [LONG, SHORT])
def test_nothing_is_handed_over_with_one_thread(size):
    assert _recorded(size, 1, "[calls(program), calls(function)]") == [[[False, 1]]] * 2


def test_short_calls_run_on_one_core_of_the_caller():
    expression = "[calls(program), calls(function), torch.get_num_threads()]"
    assert _recorded(SHORT, 3, expression) == [[[False, 1]], [[False, 1]], 3]


def test_short_calls_on_a_new_thread():
    """torch sets the number of threads again on each thread that first uses it."""
    script = """
torch.set_num_threads(3)
n_threads = []


def caller():
    n_threads.append(calls(function))
    n_threads.append(torch.get_num_threads())


function(x)
thread = threading.Thread(target=caller)
thread.start()
thread.join()
print(json.dumps(n_threads))
"""
    assert _printed(_RECORD.replace("SIZE", str(SHORT)) + script) == [[[False, 1]], 3]


# --- bits ----------------------------------------------------------------------------------------

MODULES = {
    "linear": ("nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))", (512, 64)),
    "conv": ("nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2))", (4, 3, 48, 48)),
    "lstm": ("nn.LSTM(32, 64, num_layers=2, batch_first=True)", (8, 24, 32)),
    "attention": ("nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)", (8, 48, 64)),
}

_BITS = """
import equinox as eqx

torch.manual_seed(0)
torch.set_num_threads(max(2, torch.get_num_threads()))  # a machine of one core too
module = MODULE
x = torch.randn(SHAPE)


def first(y):
    return y[0] if isinstance(y, tuple) else y


native = torch.autograd.grad(first(module(x)).sum(), list(module.parameters()))
with torch.set_grad_enabled(RESIDUALS == "live"):  # torch's LSTM has one kernel for training, another for inference
    native_y = first(module(x)).detach()

model = torchleaf.TorchModule(module, residuals=RESIDUALS)


@eqx.filter_jit
def step(model, x):
    y, pullback = eqx.filter_vjp(lambda model: first(model(x * 1.0)), model)
    return y, pullback(jnp.ones_like(y))[0]


for _ in range(5):
    y, grads = step(model, torchleaf.to_jax(x))
    np.testing.assert_array_equal(y, native_y)
    for (name, _), gradient in zip(module.named_parameters(), native, strict=True):
        np.testing.assert_array_equal(grads.params[name], gradient, err_msg=name)
print(json.dumps("same bits"))
"""


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("name", MODULES)
def test_bits_are_those_of_torch_with_as_many_threads(name, residuals):
    module, shape = MODULES[name]
    script = _BITS.replace("MODULE", module).replace("SHAPE", str(shape)).replace("RESIDUALS", repr(residuals))
    assert _printed(script) == "same bits"


def test_a_call_gives_the_same_bits_while_another_is_running():
    script = """
torch.set_num_threads(max(2, torch.get_num_threads()))
running, done = threading.Event(), threading.Event()


def slow(x):
    if waits:
        running.set()
        done.wait(5)
    return x @ x


waits = False
total = jax.jit(torchleaf.torch_function(lambda x: (x * 1.1).sum()))  # rounds otherwise with other numbers of threads
slow = jax.jit(torchleaf.torch_function(slow)).lower(jnp.eye(256)).compile()
x = jax.random.normal(jax.random.key(0), (2000, 2003))
alone = total(x).item()
waits = True
thread = threading.Thread(target=lambda: jax.block_until_ready(slow(jnp.eye(256))))
thread.start()
assert running.wait(5)
beside = total(x).item()
done.set()
thread.join()
print(json.dumps([alone, beside]))
"""
    alone, beside = _printed(script)
    assert alone == beside
