"""Torch calls on NVIDIA GPUs: XLA's buffers, stream and device, without waiting for any of them."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from on_gpu import numbers, on_gpu, synchronising_is_an_error
from samples import NARROW, dtype_id, raw_bytes, sample
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import TorchModule, to_jax, to_torch, torch_function

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_every_dtype_passes_through(dtype):
    array = on_gpu(to_jax(sample(dtype, (3, 4)), copy=True))
    fn = torch_function(lambda x: (x.clone(), x.T))
    copied, transposed = jax.jit(lambda x: fn(x[None][0]))(array)
    assert copied.devices() == array.devices()
    assert copied.dtype == array.dtype
    assert raw_bytes(copied) == raw_bytes(array)
    assert raw_bytes(transposed) == raw_bytes(np.asarray(array).T)


def test_values_and_derivatives():
    def loss(tanh, w, x):
        return (tanh(x @ w) ** 2).sum()

    w, x = on_gpu(numbers(5, 3)), on_gpu(numbers(4, 5))
    in_torch, in_jax = (lambda w, x, f=f: loss(f, w, x) for f in (torch_function(torch.tanh), jnp.tanh))
    for transform in (
        lambda f: f,
        jax.value_and_grad,
        lambda f: jax.grad(f, (0, 1)),
        jax.hessian,
        lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x)),
        lambda f: jax.vmap(jax.grad(f), (None, 0)),
    ):
        actual, expected = transform(in_torch), transform(in_jax)
        assert_trees_close(actual(w, x), expected(w, x), rtol=1e-4, atol=1e-5)
        assert_trees_close(jax.jit(actual)(w, x), expected(w, x), rtol=1e-4, atol=1e-5)


def test_torch_reads_xla_buffers_on_xla_stream_and_device():
    seen = {}

    def look(x):
        if not isinstance(x, FakeTensor):
            seen.update(pointer=x.data_ptr(), device=x.device, stream=torch.cuda.current_stream(x.device).cuda_stream)
        return x + torch.ones(3, device=x.device)

    for index, device in enumerate(jax.devices("gpu")):
        x = on_gpu(numbers(4, 3), index)
        y = torch_function(look)(x)
        assert y.devices() == {device}
        np.testing.assert_allclose(y, np.asarray(x) + 1, rtol=1e-6)
        assert seen["pointer"] == x.unsafe_buffer_pointer()
        assert seen["device"] == torch.device("cuda", device.local_hardware_id)
        assert seen["stream"] != torch.cuda.default_stream(seen["device"]).cuda_stream
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_calls_are_ordered_with_the_ops_around_them():
    """Slow producers and consumers on XLA's stream: a call on another one would read or write too early."""
    fn = torch_function(lambda x: x.sin() @ x.cos() / 32)

    def program(f, x):  # no step magnifies rounding errors
        for _ in range(5):
            x = jnp.tanh(f(x @ x / 32)) @ x / 32 + x / 2
        return x

    x = on_gpu(numbers(1024, 1024))
    in_torch = jax.jit(lambda x: program(fn, x))
    expected = jax.jit(lambda x: program(lambda y: jnp.sin(y) @ jnp.cos(y) / 32, x))(x)
    for _ in range(10):
        np.testing.assert_allclose(in_torch(x), expected, rtol=1e-3, atol=1e-4)


def test_dispatch_does_not_wait():
    """Of a call that is too large to be recorded; a kernel's first launch may itself wait."""

    def slow(x):
        m = torch.full((4096, 4096), 1 / 4096, device=x.device)
        for _ in range(100):
            m = m @ m
        return x * 2 + m[0, 0]

    fn = jax.jit(lambda x: torch_function(slow)(x) + 1)
    x = on_gpu(numbers(8))
    for _ in range(2):
        jax.block_until_ready(fn(x))
    with synchronising_is_an_error():
        start = time.perf_counter()
        y = fn(x)
        dispatched = time.perf_counter() - start
        jax.block_until_ready(y)
        finished = time.perf_counter() - start
    np.testing.assert_allclose(y, 2 * np.asarray(x) + 1 + 1 / 4096, rtol=1e-5)
    assert finished > 0.1
    assert dispatched < finished / 2


def test_training_step_does_not_synchronise():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
    model = TorchModule(module)
    xs = on_gpu(numbers(32, 8))

    @eqx.filter_jit
    def step(model):
        grads = eqx.filter_grad(lambda m: (jax.vmap(m)(xs) ** 2).mean())(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))

    for _ in range(4):  # the first runs are looked at
        stepped = jax.block_until_ready(step(model))
    with synchronising_is_an_error():
        for _ in range(3):
            model = step(model)
        jax.block_until_ready(model)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for i in range(3):
        optimizer.zero_grad()
        (module(to_torch(xs)) ** 2).mean().backward()
        optimizer.step()
        if i == 0:
            for name, parameter in module.named_parameters():
                np.testing.assert_allclose(stepped.params[name], parameter.detach().cpu(), rtol=1e-4, atol=1e-6)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(model.params[name], parameter.detach().cpu(), rtol=1e-4, atol=1e-6)


def test_memory_is_not_reused_too_early():
    """Two allocators share the device: temporaries of either must stay until their stream is done with them."""
    fn = torch_function(lambda w, x: ((x @ w).relu() @ w.mT).square().mean())
    step = jax.jit(jax.value_and_grad(fn))
    twin = jax.jit(jax.value_and_grad(lambda w, x: jnp.square(jax.nn.relu(x @ w) @ w.T).mean()))
    w = on_gpu(numbers(256, 512) / 16)
    pending = []
    for i in range(60):
        x = on_gpu(numbers(64 + i % 3, 256, seed=i))
        pending.append((step(w, x), twin(w, x)))
        torch.full((512 + i, 512), float("nan"), device="cuda")  # lands in whatever torch took for free
    for actual, expected in pending:
        assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_calls_on_the_cpu_of_a_gpu_process():
    cpu = jax.devices("cpu")[0]
    fn = jax.jit(jax.grad(torch_function(lambda x: x.sin().sum())))
    x = jax.device_put(numbers(5), cpu)
    assert fn(x).devices() == {cpu}
    np.testing.assert_allclose(fn(x), np.cos(np.asarray(x)), rtol=1e-5)
    np.testing.assert_allclose(fn(on_gpu(np.asarray(x))), np.cos(np.asarray(x)), rtol=1e-5)


def test_torch_errors_reach_the_user():
    fn = jax.jit(torch_function(lambda x: x if isinstance(x, FakeTensor) else x @ torch.ones(3, 3, device=x.device)))
    with pytest.raises((RuntimeError, ValueError), match=r"lambda.* raised RuntimeError"):
        jax.block_until_ready(fn(on_gpu(numbers(4, 2))))
