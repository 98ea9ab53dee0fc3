"""In every framework only what is needed is computed: torch's ops are counted, and what they make is inspected."""

import jax
import jax.numpy as jnp
import pytest
import torchleaf
from compare import assert_trees_close
from frameworks import eager_and_jit, every_framework
from module_reference import torch_gradients_of, weighted_sum
from torch import nn
from watching import OpLog

pytestmark = every_framework

B, IN, OUT = 6, 3, 7


@pytest.fixture
def forward():
    return OpLog()


def _logged(log):
    class Logged(nn.Linear):
        forward = log.wrap(nn.Linear.forward)

    return Logged(IN, OUT)


@eager_and_jit
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients_of_a_batch_are_summed_in_torch(framework, residuals, jit, forward, backward, rng):
    """grad(vmap): one matrix product for all examples, each way, and no weight gradient of single examples."""
    module = _logged(forward)
    xs = jnp.asarray(rng.normal(size=(B, IN)), jnp.float32)
    expected, _ = torch_gradients_of(module, module, (torchleaf.to_torch(xs),), {})

    def loss(model):
        return weighted_sum(model.vmap(lambda m, x: m(x))(xs)), None

    step = framework(module, residuals=residuals).maybe_jit(lambda m: m.gradients(loss), jit=jit)
    for _ in range(2):  # the first run makes a proof
        for log in (forward, backward):
            log.counts.clear()
            log.shapes.clear()
        grads = jax.block_until_ready(step().weights.params)
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-5)
    assert backward.matmuls == 1
    assert forward.matmuls == (1 if residuals == "live" else 2)
    assert (B, OUT) in forward.shapes
    assert {(OUT, IN), (IN, OUT)} & backward.shapes
    assert not {(B, OUT, IN), (B, IN, OUT)} & (forward.shapes | backward.shapes)


def test_gradients_of_each_example_would_be_seen(framework, backward, rng):
    """vmap(grad), where they are asked for: the counterpart of the test above."""
    xs = jnp.asarray(rng.normal(size=(B, IN)), jnp.float32)

    def of_one(model, x):
        return model.gradients(lambda m: (weighted_sum(m(x)), None)).weights.params

    jax.block_until_ready(framework(nn.Linear(IN, OUT)).vmap(of_one)(xs))
    assert {(B, OUT, IN), (B, IN, OUT)} & backward.shapes


@eager_and_jit
def test_jax_sees_no_weight_gradients_of_single_examples(framework, jit, rng):
    model, xs = framework(nn.Linear(IN, OUT)), jnp.asarray(rng.normal(size=(B, IN)), jnp.float32)

    def program(weights):
        def loss(model):
            return weighted_sum(model.vmap(lambda m, x: m(x))(xs)), None

        return model.replaced(weights).maybe_jit(lambda m: m.gradients(loss).weights.params, jit=jit)()

    jaxpr = str(jax.make_jaxpr(program)(model.weights.params))
    assert f"f32[{OUT},{IN}]" in jaxpr
    assert f"f32[{B},{OUT}]" in jaxpr
    assert f"[{B},{OUT},{IN}]" not in jaxpr


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize(("frozen", "products"), [((), 7), ((0,), 5), ((0, 1, 2), 1), ((3,), 6)], ids=str)
def test_frozen_parameters_cost_no_backward(framework, frozen, products, jit, backward):
    """Matrix products as in torch: one for each trained weight, one for each activation above the lowest of them."""
    module, x = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))), jnp.ones((5, 8))
    for i in frozen:
        module[i].requires_grad_(False)
    program = framework(module).maybe_jit(lambda m: m.gradients(lambda m: (weighted_sum(m(x)), None)), jit=jit)
    jax.block_until_ready(program().weights)
    assert backward.matmuls == products
