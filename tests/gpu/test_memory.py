"""Memory of a GPU that two allocators share."""

import gc
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_gpu import numbers, on_gpu
from torchleaf import torch_function

pytestmark = pytest.mark.gpu


def test_out_of_memory_is_an_error_and_both_go_on():
    greedy = torch_function(lambda x: torch.empty(2**42, device=x.device)[:8] + x)
    fine = torch_function(lambda x: x * 2)
    x = on_gpu(numbers(8))
    for _ in range(2):
        with pytest.raises(Exception, match="out of memory"):
            jax.block_until_ready(jax.jit(lambda x: greedy(x).sum())(x))
        np.testing.assert_allclose(jax.jit(fine)(x), 2 * np.asarray(x))
        np.testing.assert_allclose(jnp.sin(x), np.sin(np.asarray(x)), rtol=1e-5)
        assert (torch.ones(3, device="cuda") * 2).sum().item() == 6


def test_dropped_programs_give_their_memory_back():
    def use():
        fn = torch_function(lambda w, x: torch.tanh(x @ w))
        step = jax.jit(jax.grad(lambda w, x: jnp.sum(fn(w, x) ** 2)))
        w, x = on_gpu(numbers(512, 512)), on_gpu(numbers(512, 512))
        for _ in range(6):
            jax.block_until_ready(step(w, x))

    def settle():
        jax.clear_caches()
        gc.collect()
        return torch.cuda.memory_allocated()

    use()
    before = settle()
    for _ in range(5):
        use()
    assert settle() <= before + 2**20


_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, torch, torchleaf
fn = torchleaf.torch_function(lambda x: torch.sin(x) * 2)
f = jax.jit(lambda x: jnp.tanh(fn(jnp.tanh(x) + 1) * 3) + fn(x))
x = jnp.linspace(-1, 1, 50)
for _ in range(5):
    y = f(x)
expected = np.tanh(np.sin(np.tanh(np.asarray(x)) + 1) * 6) + 2 * np.sin(np.asarray(x))
np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
print("right")
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1"},
        {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"},
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        {"PYTORCH_CUDA_ALLOC_CONF": ""},
        {"CUDA_LAUNCH_BLOCKING": "1"},
        {"JAX_PLATFORMS": "cpu"},
    ],
    ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()),
)
def test_settings(environment):
    """Command buffers of one op, each allocator's ways, JAX on the CPU beside torch's CUDA."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


_LOOP = """
import sys
import jax, jax.numpy as jnp, numpy as np, torch, torchleaf
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32)).cuda()
model = torchleaf.TorchModule(module)
weights = {n: np.asarray(p.detach().cpu()) for n, p in module.named_parameters()}
is_view = all(model.params[n].unsafe_buffer_pointer() == p.data_ptr() for n, p in module.named_parameters())

@jax.jit
def epoch(params):
    def step(carry, _):
        total = sum(jnp.sum(p) for p in carry.values())
        return {n: p * 0.9 + 1e-3 * jnp.tanh(total) for n, p in carry.items()}, total
    after, totals = jax.lax.scan(step, params, None, length=3)
    return after, totals, {n: jnp.copy(p) for n, p in params.items()}

params, expected = model.params, weights
with jax.default_device(jax.devices("cpu")[0]):
    expected_of = jax.jit(lambda p: epoch.__wrapped__(p))
for _ in range(5):
    params, totals, _ = epoch(params)
    expected, *_ = jax.device_get(expected_of(jax.device_put(expected, jax.devices("cpu")[0])))
for name, p in params.items():
    np.testing.assert_allclose(p, expected[name], rtol=1e-4, atol=1e-5)
print("views" if is_view else "copies")
"""


@pytest.mark.parametrize(("setting", "leaves"), [("", "copies"), ("expandable_segments:True", "views")])
def test_weights_are_of_xlas_kind_of_memory(setting, leaves):
    """A captured copy cannot go from torch's memory to XLA's, where they are of two kinds."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting}
    done = subprocess.run([sys.executable, "-c", _LOOP], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == leaves, done.stderr[-2000:]
