"""Order of work between the frameworks' streams, with long kernels before and after, both ways."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_gpu import cycles, full_precision, numbers, on_gpu
from torchleaf import to_jax, to_torch, torch_function

pytestmark = pytest.mark.gpu


def slow_jax(x):
    """Some milliseconds of XLA's work that gives x back."""
    y = jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y / 40), jnp.ones((1024, 1024)) * x.ravel()[0])
    return x + 0 * y[0, 0]


def test_a_call_waits_for_jax_and_jax_for_the_call():
    def slow(x):
        torch.cuda._sleep(cycles(0.05))
        return x * 2

    fn = torch_function(slow)
    program = jax.jit(lambda x: slow_jax(fn(slow_jax(x)) + 1))
    for run in range(5):
        x = on_gpu(numbers(64, seed=run))
        np.testing.assert_allclose(program(x), 2 * np.asarray(x) + 1, rtol=1e-5)


def test_captured_tensors_that_are_still_being_written():
    scale = torch.zeros(1000, device="cuda")
    fn = jax.jit(torch_function(lambda x: x * scale))
    x = on_gpu(np.ones(1000, np.float32))
    jax.block_until_ready(fn(x))
    for run in range(1, 8):
        torch.cuda._sleep(cycles(0.03))
        scale.fill_(run)  # on torch's stream, after a long kernel
        found = fn(x)
        scale.fill_(-1)  # must not come before the call has read it
        np.testing.assert_array_equal(found, np.full(1000, run))


def test_a_result_of_jax_in_torch_and_back():
    fn = torch_function(lambda x: x + 1)
    for run in range(5):
        x = on_gpu(numbers(256, seed=run))
        y = jax.jit(lambda x: fn(slow_jax(x)))(x)
        torch.cuda._sleep(cycles(0.02))
        z = to_jax(to_torch(y) * 3)
        np.testing.assert_allclose(jax.jit(lambda z: fn(z))(z), 3 * (np.asarray(x) + 1) + 1, rtol=1e-5)


def test_the_users_stream_is_his_again():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        jax.block_until_ready(jax.jit(torch_function(lambda x: x * 2))(on_gpu(numbers(5))))
        assert torch.cuda.current_stream() == stream


def test_threads():
    fn = torch_function(lambda w, x: torch.tanh(x @ w))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(fn(w, x) ** 2)))
    expected = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)))
    failures = []

    def work(seed):
        w, x = on_gpu(numbers(32, 32, seed=seed) / 6), on_gpu(numbers(8, 32, seed=seed + 100))
        with full_precision():
            right = np.asarray(expected(w, x))
            for _ in range(25):
                if not np.allclose(gradient(w, x), right, rtol=1e-3, atol=1e-4):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
