"""`engine="xla"` on a GPU: torch's values, with its tensors there or on the CPU; ops that torch computes; keys."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from on_gpu import numbers, on_gpu
from torch import nn
from torchleaf import TorchModule, torch_function
from torchleaf.interop.values import device

pytestmark = pytest.mark.gpu


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_networks_are_the_other_engines(place):
    module, x = network().to(place).eval(), on_gpu(numbers(4, 3, 6, 6))
    found = []
    for engine in ("torch", "xla"):
        model = TorchModule(module, engine=engine)
        step = eqx.filter_jit(eqx.filter_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2)))
        value, grads = step(model, x)
        assert value.devices() == {jax.devices("gpu")[0]}
        found.append((value, grads.params))
    assert_trees_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_tensors_of_its_own(place, monkeypatch):
    """On the CPU by a torch that has no other, beside a JAX on the GPU."""
    monkeypatch.setattr(device, "_has_cuda", lambda: place == "cuda")
    scale = torch.arange(1.0, 4.0, device=place)
    fn = torch_function(lambda x: x * scale, engine="xla")
    x = on_gpu(numbers(2, 3))
    np.testing.assert_allclose(jax.jit(fn)(x), np.asarray(x) * [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: fn(x).sum())(x), np.broadcast_to([1.0, 2, 3], (2, 3)), rtol=1e-6)


def test_attention_recurrence_and_loops():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    for module, x in ((encoder, numbers(2, 5, 16)), (nn.LSTM(16, 8, batch_first=True), numbers(2, 5, 16))):
        expected = module(torch.from_numpy(x))
        expected = (expected if isinstance(expected, torch.Tensor) else expected[0]).detach()
        model = TorchModule(module.cuda(), engine="xla")
        found = eqx.filter_jit(lambda model, x: model(x))(model, on_gpu(x))
        np.testing.assert_allclose(found[0] if isinstance(found, tuple) else found, expected, rtol=1e-3, atol=1e-4)


def test_an_op_that_torch_computes():
    def torch_op(x):
        return torch.linalg.eigvals(x.sin() / 9 + torch.diag(torch.arange(1.0, 4.0, device=x.device))).real.square()

    x = numbers(3, 3)
    fn = torch_function(torch_op, engine="xla")
    for run in range(4):
        np.testing.assert_allclose(jax.jit(fn)(on_gpu(x + run)), torch_op(torch.from_numpy(x + run)), rtol=1e-3)
    (right,) = torch.autograd.grad(torch_op(t := torch.from_numpy(x).requires_grad_()).square().sum(), t)
    found = jax.jit(jax.grad(lambda x: jnp.sum(fn(x) ** 2)))(on_gpu(x))
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-3)


def test_random_numbers_follow_the_key():
    fn = torch_function(lambda x: nn.functional.dropout(x, 0.5), engine="xla")
    x, key = on_gpu(np.ones((64, 64), np.float32)), jax.random.key(0)
    first = np.asarray(jax.jit(fn)(x, key=key))
    np.testing.assert_array_equal(first, fn(x, key=key))
    np.testing.assert_array_equal(jax.grad(lambda x: fn(x, key=key).sum())(x), first)
    assert 0.4 < (first == 0).mean() < 0.6
    assert (first != np.asarray(fn(x, key=jax.random.key(1)))).any()


@pytest.mark.parametrize("engine", ["torch", "xla"])
def test_sharded_over_a_mesh_of_one(engine):
    mesh = jax.make_mesh((1,), ("batch",), devices=jax.devices("gpu")[:1])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = eqx.filter_shard(TorchModule(module, engine=engine), whole)
    x = numbers(4, 6)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def step(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    loss = module(torch.from_numpy(x)).square().mean()
    loss.backward()
    for _ in range(4):
        value, grads = step(model, jax.device_put(x, split))
        np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(grads.params[name], parameter.grad, rtol=1e-3, atol=1e-5)
