"""Live residuals: the same bits as torch's own backward, and no graph left behind."""

import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from torch import nn
from torchleaf.interop.calls.residuals import live_graphs


@pytest.fixture
def torch_module():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)


def _plain(model, x):
    return (model(x) ** 2).sum()


def _ignores_output(model, x):
    return (model(x), (model.params["0.bias"] ** 2).sum())[1]


def _stops_gradient(model, x):
    return jax.lax.stop_gradient(model(x)).sum() * model.params["0.bias"].sum()


def _checkpoint(model, x):
    params, static = eqx.partition(model, eqx.is_array)
    return jax.checkpoint(lambda params: _plain(eqx.combine(params, static), x))(params)


def _scan(model, x):
    return jax.lax.scan(lambda carry, _: (model(carry), None), x, None, length=4)[0].sum()


def _cond(model, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: model(x).sum(), lambda: x.sum())


def _vmap(model, x):
    return jax.vmap(model)(x).sum()


LOSSES = [_plain, _ignores_output, _stops_gradient, _scan, _cond, _vmap]


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_have_the_bits_of_torch(torch_module, x, residuals):
    model = torchleaf.TorchModule(torch_module, residuals=residuals)
    grads = eqx.filter_jit(eqx.filter_grad(lambda model, x: model(x).sum()))(model, x)
    torch_module(torchleaf.to_torch(x)).sum().backward()
    for name, parameter in torch_module.named_parameters():
        np.testing.assert_array_equal(grads.params[name], parameter.grad)


@pytest.mark.long
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__.strip("_"))
def test_no_graph_stays_behind(torch_module, x, loss, jit):
    _check_no_graph_stays_behind(torch_module, x, loss, jit)


@pytest.mark.usefixtures("each_remat")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_no_graph_of_a_checkpoint_stays_behind(torch_module, x, jit):
    _check_no_graph_stays_behind(torch_module, x, _checkpoint, jit)


def _check_no_graph_stays_behind(torch_module, x, loss, jit):
    model = torchleaf.TorchModule(torch_module)
    gradient = eqx.filter_jit(eqx.filter_grad(loss)) if jit else eqx.filter_grad(loss)
    gc.collect()
    before = live_graphs()
    for _ in range(3):
        jax.block_until_ready(jax.tree.leaves(gradient(model, x)))
    gc.collect()
    assert live_graphs() == before


def test_aux_output_leaves_no_graph(torch_module, x):
    model = torchleaf.TorchModule(torch_module)
    before = live_graphs()
    step = eqx.filter_jit(eqx.filter_grad(lambda model, x: (_ignores_output(model, x), model(x)), has_aux=True))
    jax.block_until_ready(jax.tree.leaves(step(model, x)))
    assert live_graphs() == before


def test_backward_runs_twice(x):
    function = torchleaf.torch_function(lambda x: torch.tanh(x) * x.cos())
    y, pullback = jax.vjp(function, x)
    first, second = pullback(y), pullback(y)
    np.testing.assert_array_equal(first[0], second[0])
    expected = jax.vjp(lambda x: jnp.tanh(x) * jnp.cos(x), x)[1](y)
    np.testing.assert_allclose(first[0], expected[0], rtol=1e-5, atol=1e-6)


def test_backwards_in_another_order(x):
    function = torchleaf.torch_function(torch.sin)
    pullbacks = [jax.vjp(function, x * k)[1] for k in (1.0, 2.0, 3.0)]
    for k in (1, 0, 2):
        np.testing.assert_allclose(pullbacks[k](jnp.ones_like(x))[0], jnp.cos(x * (k + 1.0)), rtol=1e-5, atol=1e-6)


def test_dropped_pullback_drops_its_graph(x):
    before = live_graphs()
    _, pullback = jax.vjp(torchleaf.torch_function(torch.tanh), x)
    assert live_graphs() == before + 1
    del pullback
    gc.collect()
    assert live_graphs() == before
