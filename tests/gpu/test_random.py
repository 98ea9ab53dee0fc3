"""Random numbers on a GPU: from the key, which the host does not read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from on_gpu import numbers, on_gpu, synchronising_is_an_error
from philox_reference import philox
from scipy import stats
from torch import nn
from torchleaf import torch_function

pytestmark = pytest.mark.gpu
N = 40_000


@pytest.mark.parametrize("words", [2, 4])
def test_bits_are_those_of_the_reference(words):
    from torchleaf.interop.modes import philox as kernel

    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (3, words), dtype=np.uint32))
    for n, index in ((1, 0), (4, 1), (4099, 7)):
        assert torch.equal(kernel.bits(keys.cuda(), n, index).cpu(), philox(keys, n, index))
    shared = keys[:1].expand(5, words)
    assert torch.equal(kernel.bits(shared.cuda()[:1].expand(5, words), 4, 2).cpu(), philox(shared, 4, 2))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_keys_are_not_read_by_the_host(jit):
    def draw(x):
        return (
            nn.functional.dropout(x, 0.25),
            torch.randn_like(x),
            torch.rand(N, device=x.device),
            x.clone().exponential_(2.0),
            torch.randint(0, 5, (N,), device=x.device),
        )

    fn = torch_function(draw)

    def call(x, key):
        return fn(x, key=key)

    call = jax.jit(call) if jit else call
    x, keys = on_gpu(jnp.ones(N)), jax.random.split(on_gpu(jax.random.key(0)), 6)
    keys = [keys[i] for i in range(6)]
    jax.block_until_ready(call(x, keys[0]))
    with synchronising_is_an_error():
        drawn = [call(x, key) for key in keys]
    for dropped, normal, uniform, exponential, integers in drawn:
        assert abs(float(jnp.mean(dropped == 0)) - 0.25) < 0.02
        assert stats.kstest(normal, "norm").pvalue > 1e-4
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4
        assert stats.kstest(exponential, "expon", (0, 0.5)).pvalue > 1e-4
        assert set(np.unique(integers)) == set(range(5))
    assert not np.array_equal(drawn[0][1], drawn[1][1])
    for again, first in zip(call(x, keys[0]), drawn[0], strict=True):
        np.testing.assert_array_equal(again, first)


def test_each_example_has_its_own_numbers():
    fn = torch_function(lambda x: nn.functional.dropout(x, 0.5) + torch.rand_like(x))
    xs, keys = on_gpu(numbers(5, 40)), jax.random.split(jax.random.key(1), 5)
    batched = jax.jit(jax.vmap(lambda x, key: fn(x, key=key)))(xs, keys)
    for i in range(5):
        np.testing.assert_allclose(batched[i], fn(xs[i], key=keys[i]), rtol=1e-6)
    shared = jax.vmap(lambda x: fn(x, key=keys[0]))(xs)
    for i in range(5):
        np.testing.assert_allclose(shared[i], fn(xs[i], key=keys[0]), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:vmap of")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_drops_the_same_weights_in_all_derivatives(dtype, is_causal):
    """torch's fused kernels have no forward mode and draw other masks than the plain one."""
    fn = torch_function(
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=is_causal)
    )
    q, k, v, ct = (on_gpu(jnp.asarray(numbers(2, 2, 8, 16, seed=i), dtype)) for i in range(4))
    key = jax.random.key(0)

    def attend(v):  # linear in v
        return fn(q, k, v, key=key)

    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}
    for f in (attend, jax.jit(attend)):
        y = f(v)
        np.testing.assert_allclose(*map(_float, (jax.jvp(f, (v,), (v,))[1], y)), **tolerance)
        np.testing.assert_allclose(*map(_float, (jax.checkpoint(f)(v), y)), **tolerance)
        (pulled,) = jax.vjp(f, v)[1](ct)
        np.testing.assert_allclose(jnp.vdot(_float(pulled), _float(v)), jnp.vdot(_float(ct), _float(y)), rtol=0.03)
    keys = jax.random.split(key, 3)
    batched = jax.vmap(lambda key: fn(q, k, v, key=key))(keys)
    for i in range(3):
        np.testing.assert_allclose(*map(_float, (batched[i], fn(q, k, v, key=keys[i]))), **tolerance)


def _float(x):
    return x.astype(jnp.float32)


def test_rare_distributions_and_fused_dropout_follow_from_the_key_as_well():
    def draw(x):
        q = x.reshape(1, 2, 8, 16)
        attended = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        return torch.poisson(x.abs() * 5), torch._standard_gamma(x.abs() + 1), attended

    fn, x = torch_function(draw), on_gpu(numbers(256))
    first, again, other = (fn(x, key=jax.random.key(i)) for i in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_the_backward_pass_has_the_same_mask(residuals):
    fn = torch_function(lambda x: nn.functional.dropout(x, 0.5), residuals=residuals)
    x, key = on_gpu(jnp.ones(100)), jax.random.key(3)
    both = jax.jit(lambda x: (fn(x, key=key), jax.grad(lambda x: jnp.sum(fn(x, key=key)))(x)))
    for _ in range(5):
        y, gradient = both(x)
        np.testing.assert_array_equal(gradient, y)
