"""Skeletons: threads in one model compute with their own weights, and calls leave nothing behind."""

import copy
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close
from custom_layers import TiedAutoencoder
from module_reference import eager_and_filter_jit
from torch import nn
from torchleaf.layers.module.copying import copy_replacing
from torchleaf.layers.module.skeleton import SkeletonPool

THREADS, CALLS = 8, 25


class _Slow(nn.Module):
    """Between reading its two weights, gives other threads every chance to interfere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(5):
            h = torch.tanh(h)
        return self.second(h)


def _with_constant_weights(model, value):
    return eqx.tree_at(lambda m: m.params, model, {n: jnp.full_like(w, value) for n, w in model.params.items()})


@eager_and_filter_jit
def test_threads_with_different_weights_get_their_own_results(jit, rng):
    model, call = torchleaf.TorchModule(_Slow()), jit(lambda m, x: m(x))
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    models = [_with_constant_weights(model, 0.01 * (i + 1)) for i in range(THREADS)]
    expected = [np.asarray(call(m, x)) for m in models]
    assert len({e.tobytes() for e in expected}) == THREADS

    def work(i):
        return [np.asarray(call(models[i], x)) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for outputs, reference in zip(pool.map(work, range(THREADS)), expected, strict=True):
            for output in outputs:
                np.testing.assert_allclose(output, reference, rtol=1e-5)


def test_threads_differentiating_different_weights(rng):
    model = torchleaf.TorchModule(_Slow())
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: (m(x) ** 2).sum()))
    models = [_with_constant_weights(model, 0.01 * (i + 1)) for i in range(THREADS)]
    expected = [gradient(m).params for m in models]
    with ThreadPoolExecutor(THREADS) as pool:
        for i, grads in enumerate(pool.map(lambda i: gradient(models[i % THREADS]).params, range(THREADS * CALLS))):
            assert_trees_close(grads, expected[i % THREADS])


def test_threads_tracing_at_once(rng):
    """Each thread meets a shape of its own for the first time."""
    module = _Slow()
    model = torchleaf.TorchModule(module)
    xs = [jnp.asarray(rng.normal(size=(i + 1, 4)), jnp.float32) for i in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        outputs = list(pool.map(model, xs))
    for x, y in zip(xs, outputs, strict=True):
        np.testing.assert_allclose(y, module(torchleaf.to_torch(x)).detach(), rtol=1e-5, atol=1e-6)


def test_pool_lends_each_skeleton_to_one_borrower_at_a_time():
    pool = SkeletonPool(nn.Linear(3, 2, device="meta"), training=False)
    first, second = pool.borrow(), pool.borrow()
    assert first.module is not second.module
    assert first.module.weight is second.module.weight  # meta tensors hold nothing
    pool.give_back(second)
    assert pool.borrow() is second
    assert not first.module.training


def test_skeleton_takes_weights_in_and_out_by_sorted_name():
    with torch.device("meta"):
        module = TiedAutoencoder(5, 3)
    skeleton = SkeletonPool(module, training=True).borrow()
    weights = [torch.randn(5, 3), torch.randn(5)]  # embed.weight, also project.weight; project.bias
    skeleton.load(weights)
    assert skeleton.module.embed.weight is skeleton.module.project.weight is weights[0]
    assert skeleton.module.project.bias is weights[1]
    assert skeleton.unload() == {}
    skeleton.load(weights)
    skeleton.module.embed.weight = replaced = nn.Parameter(torch.zeros(5, 3))
    assert skeleton.unload() == {0: replaced}
    assert {p.device.type for p in skeleton.module.parameters()} == {"meta"}


def test_failed_calls_leave_the_model_usable(rng):
    class Positive(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x < 0).any():
                raise ValueError("negative")
            return super().forward(x)

    module = Positive(3, 2)
    call = eqx.filter_jit(torchleaf.TorchModule(module, out_shape=jax.ShapeDtypeStruct((2,), jnp.float32)))
    for _ in range(5):
        with pytest.raises(Exception, match="negative"):
            call(-jnp.ones(3)).block_until_ready()
        np.testing.assert_allclose(call(jnp.ones(3)), module(torch.ones(3)).detach(), rtol=1e-5)


def test_copy_replacing_keeps_ties_and_the_original():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    before = copy.deepcopy(module.state_dict())
    new = nn.Parameter(torch.zeros(3, 3))
    copied = copy_replacing(module, {module["a"].weight: new})
    assert copied["a"].weight is new
    assert copied["b"].weight is new
    assert copied["a"].bias is not module["a"].bias
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
