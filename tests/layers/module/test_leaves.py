"""Leaves are like an initialiser's arrays, and still torch's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import every_framework
from fresh_process import run_python
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.int32, torch.bool]


def _module_of(tensor):
    module = nn.Module()
    if tensor.is_floating_point() or tensor.is_complex():
        module.w = nn.Parameter(tensor, requires_grad=tensor.itemsize > 1)
    else:
        module.register_buffer("w", tensor)
    module.forward = lambda x: x
    return module


def _leaf(model):
    return next(iter(model.weights.all.values()))


@every_framework
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uncommitted_views(framework, dtype):
    tensor = torch.arange(64).reshape(8, 8).to(dtype)
    leaf = _leaf(framework(_module_of(tensor)))
    assert not leaf.committed
    assert leaf.unsafe_buffer_pointer() == tensor.data_ptr()
    assert np.array_equal(np.asarray(leaf).view(np.uint8), tensor.view(torch.uint8).numpy())


@every_framework
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60.0).reshape(6, 10).t(),
        torch.arange(64.0).reshape(2, 2, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(65.0)[1:],
        torch.arange(64.0)[::2],
        torch.zeros(0, 3),
        torch.tensor(3.0),
        torch.ones(1).expand(4, 5),
        torch.randn(8, dtype=torch.complex64).conj(),
    ],
    ids=["transposed", "channels last", "misaligned", "strided", "empty", "scalar", "expanded", "conjugate"],
)
def test_odd_memory(framework, tensor):
    """Right values wherever it lies; shared where JAX can."""
    leaf = _leaf(framework(_module_of(tensor)))
    assert_trees_close(leaf, from_torch(tensor), rtol=0, atol=0)
    if tensor.numel() == 60 or tensor.ndim == 4:
        assert leaf.unsafe_buffer_pointer() == tensor.data_ptr()


@every_framework
def test_int64_and_copies(framework):
    module = nn.BatchNorm1d(64)
    model = framework(module, copy=True)
    assert not any(leaf.committed for leaf in model.weights.all.values())
    pointers = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert pointers.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in model.weights.all.values())
    loaded = model.load_state_dict(nn.BatchNorm1d(64).state_dict())
    assert not any(leaf.committed for leaf in loaded.weights.all.values())


def test_to_jax_commits_as_dlpack_does():
    assert torchleaf.to_jax(torch.ones(3)).committed


def test_donated_leaves_leave_torch_alone():
    module = nn.Linear(16, 16)
    before = module.weight.detach().clone()
    model = torchleaf.TorchModule(module)
    update = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    jax.block_until_ready(update(model.params))
    assert torch.equal(module.weight, before)


def test_inside_a_trace():
    """A model made within a compiled function has its weights for constants."""
    module = nn.Linear(3, 2)
    x = jnp.ones(3)
    found = jax.jit(lambda x: torchleaf.TorchModule(module)(x))(x)
    assert_trees_close(found, from_torch(module(torch.ones(3))))


@pytest.mark.long
def test_sharded_inputs():
    shown = run_python(
        """
        import jax, jax.numpy as jnp, torch, torchleaf, equinox as eqx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        x = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("data")))
        module = torch.nn.Linear(3, 2)
        call = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
        model = torchleaf.TorchModule(module, vmap_method="batched")
        assert jnp.allclose(call(model, x), module(torch.ones(4, 3)).detach().numpy(), atol=1e-6)
        nnx_model = torchleaf.nnx.TorchModule(module)
        from flax import nnx
        print(nnx.jit(lambda m, x: jax.vmap(m)(x))(nnx_model, x).shape)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert "(4, 2)" in shown
