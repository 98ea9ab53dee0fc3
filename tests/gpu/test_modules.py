"""Modules of the three frameworks on a GPU: weights as views, precision, autocast."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from flax import nnx
from on_gpu import numbers, on_gpu
from torch import nn
from torchleaf import TorchModule, to_jax, to_torch, torch_function

pytestmark = pytest.mark.gpu


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def test_weights_are_views_of_torchs_memory():
    module = network().cuda()
    model = TorchModule(module)
    for name, parameter in module.named_parameters():
        assert model.params[name].unsafe_buffer_pointer() == parameter.data_ptr()
        assert to_torch(model.params[name]).data_ptr() == parameter.data_ptr()
    moved = jax.device_put(TorchModule(network()), jax.devices("gpu")[0])
    np.testing.assert_allclose(
        eqx.nn.inference_mode(moved)(on_gpu(numbers(4, 6))),
        network().eval()(torch.from_numpy(numbers(4, 6))).detach(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_equinox_linen_and_nnx_agree_with_torch():
    x = numbers(4, 6)
    reference = network()
    expected = reference(torch.from_numpy(x)).detach().numpy()
    statistics = reference[1].running_mean.numpy()
    x = on_gpu(x)
    model, state = eqx.nn.make_with_state(TorchModule)(network().cuda())
    y, state = eqx.filter_jit(lambda m, s: m(x, state=s))(model, state)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.get(model.buffer_index)["1.running_mean"], statistics, rtol=1e-3, atol=1e-5)

    class Wrapped(linen.Module):
        @linen.compact
        def __call__(self, x):
            return torchleaf.linen.TorchModule(network().cuda(), name="torch")(x)

    variables = Wrapped().init(jax.random.key(0), x)
    y, updates = jax.jit(lambda v: Wrapped().apply(v, x, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["torch"]["1"]["running_mean"], statistics, rtol=1e-3, atol=1e-5)

    model = torchleaf.nnx.TorchModule(network().cuda())
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    np.testing.assert_allclose(model[1].running_mean[...], statistics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    module = network().to("cuda", dtype).eval()
    model, x = TorchModule(module), on_gpu(numbers(4, 6)).astype(str(dtype)[6:])
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: jnp.sum(m(x).astype(jnp.float32) ** 2)))
    for _ in range(5):
        value, grads = gradient(model)
    expected = (module(to_torch(x)).float() ** 2).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-2)
    for name, parameter in module.named_parameters():
        assert grads.params[name].dtype == jnp.dtype(str(dtype)[6:])
        np.testing.assert_allclose(
            grads.params[name].astype(jnp.float32), parameter.grad.float().cpu(), rtol=5e-2, atol=5e-2
        )


def test_fp8_matrix_product():
    def product(a, b):
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    a, b = (on_gpu(numbers(32, 32, seed=i)).astype(jnp.float8_e4m3fn) for i in range(2))
    found = jax.jit(torch_function(product))(a, b)
    expected = np.asarray(a.astype(jnp.float32)) @ np.asarray(b.astype(jnp.float32)).T
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2e-2, atol=5e-2)


def test_autocast():
    module = network().cuda().eval()
    model, x = TorchModule(module), on_gpu(numbers(4, 6))
    with torch.autocast("cuda", torch.bfloat16):
        expected = module(to_torch(x))
        assert expected.dtype == torch.bfloat16
        fn = eqx.filter_jit(lambda m, x: m(x))
        for _ in range(5):
            found = fn(model, x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected.float().detach().cpu(), rtol=2e-2, atol=2e-2)


def test_second_derivatives_and_vmap():
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()
    model, x = TorchModule(module), on_gpu(numbers(3, 5))
    hessians = jax.jit(jax.vmap(jax.hessian(lambda x: model(x)[0])))
    expected = torch.stack([torch.autograd.functional.hessian(lambda v: module(v)[0], v) for v in to_torch(x)])
    for _ in range(4):
        np.testing.assert_allclose(hessians(x), expected.cpu(), rtol=1e-3, atol=1e-5)


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def test_recurrent_and_attention_layers():
    for module in (
        nn.LSTM(6, 8, batch_first=True),
        nn.GRU(6, 8, num_layers=2, batch_first=True),
        nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    ):
        module = module.cuda()
        model, x = TorchModule(module), on_gpu(numbers(4, 5, 6))
        gradient = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(first(m(x)) ** 2)))
        for _ in range(5):
            grads = gradient(model)
        module.zero_grad()
        (first(module(to_torch(x))) ** 2).sum().backward()
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(grads.params[name], parameter.grad.cpu(), rtol=5e-3, atol=5e-3)


def test_tensors_of_the_callables_own():
    table = torch.arange(12.0, device="cuda").reshape(4, 3)
    fn = torch_function(lambda i: table[i] + torch.ones(3, device=i.device))
    found = jax.jit(fn)(on_gpu(np.array([1, 3])))
    np.testing.assert_array_equal(found, table[[1, 3]].cpu() + 1)
    np.testing.assert_array_equal(to_jax(table) @ jnp.ones(3), table.sum(1).cpu())
