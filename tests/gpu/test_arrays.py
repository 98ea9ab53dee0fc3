"""Arrays on NVIDIA GPUs, shared by both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_gpu import numbers, on_gpu
from samples import NARROW, dtype_id, raw_bytes, sample
from torchleaf import TorchModule, to_jax, to_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_arrays_are_viewed(dtype):
    tensor = sample(dtype, (4, 64)).cuda()
    array = to_jax(tensor)
    back = to_torch(array)
    assert array.devices() == {jax.devices("gpu")[0]}
    assert back.device == tensor.device
    assert tensor.data_ptr() == array.unsafe_buffer_pointer() == back.data_ptr()
    assert raw_bytes(tensor) == raw_bytes(array) == raw_bytes(back)


@pytest.mark.parametrize("copy", [False, True])
def test_layouts(copy):
    tensor = torch.arange(120.0, device="cuda").reshape(2, 3, 4, 5)
    for view in (
        tensor.permute(2, 0, 3, 1),
        tensor.to(memory_format=torch.channels_last),
        tensor[:, ::2],
        tensor[:1].expand(3, 3, 4, 5),
        tensor[:0],
    ):
        array = to_jax(view, copy=copy)
        expected = view.cpu().numpy()
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(jax.jit(lambda x: x * 2)(array), expected * 2)


def test_conversion_sees_work_that_is_still_queued():
    """Both frameworks' producers are waited for on the device, not only when the host happens to be late."""
    torch.cuda._sleep(100_000_000)
    tensor = torch.arange(1000.0, device="cuda") * 2
    np.testing.assert_array_equal(to_jax(tensor) + 1, np.arange(1000) * 2 + 1)
    array = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, y: y + 1, x))(on_gpu(np.zeros(1000, np.float32)))
    assert torch.equal((to_torch(array) + 1).cpu(), torch.full((1000,), 1001.0))


def test_memory_that_xla_finds_misaligned_is_copied():
    """XLA's programs refuse it; weights that torch has put in one piece for cuDNN lie so."""
    flat = torch.arange(12.0, device="cuda")
    for start in range(5):
        array = to_jax(flat[start:])
        np.testing.assert_allclose(jnp.sin(array), np.sin(np.arange(start, 12.0)), rtol=1e-5, atol=1e-6)
        assert (array.unsafe_buffer_pointer() == flat[start:].data_ptr()) == (start % 4 == 0)
    module = torch.nn.GRU(3, 3, num_layers=2).cuda()
    model, x = TorchModule(module), on_gpu(numbers(5, 3))
    doubled = jax.jit(lambda m: jax.tree.map(lambda p: 2 * p, m.params))(model)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(doubled[name], 2 * parameter.detach().cpu(), rtol=1e-6)
    np.testing.assert_allclose(model(x)[0], module(to_torch(x))[0].detach().cpu(), rtol=1e-4, atol=1e-5)
