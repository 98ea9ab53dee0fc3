"""Ops that JAX has no function for: torch computes them within the same program, unless that is not wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch, torch_gradients

pytestmark = pytest.mark.all_cases


def _with_a_missing_op(x):
    apart = torch.diag(torch.arange(1.0, 4.0))
    return torch.linalg.eigvals(x.sin() / 9 + apart).real.square() + x


class Halved(torch.autograd.Function):
    """Twice its argument, whose derivative is said to be a half."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def _with_a_function_of_its_own(x):
    return Halved.apply(x.sin()).square()


_halved = Halved.apply  # as most users of such functions write it


def _with_one_that_was_bound_before(x):
    return _halved(x * 2).sin()


def carried_by(ours):
    return {name for made in ours._specialized.values() for name in made.graph.carried()}


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (_with_a_missing_op, "linalg_eig.default"),
        (_with_a_function_of_its_own, "torch.autograd.Function Halved"),
        (_with_one_that_was_bound_before, "torch.autograd.Function Halved"),
        (_halved, "torch.autograd.Function Halved"),
    ],
)
def test_torch_computes_what_is_missing(fn, op):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    ours = torchleaf.torch_function(fn, engine="xla")
    assert_trees_close(jax.jit(ours)(x), from_torch(fn(torch.from_numpy(np.array(x)))), rtol=1e-4, atol=1e-5)
    assert carried_by(ours) == {op}

    def loss(x):
        return fn(x).sum()

    gradient = jax.jit(jax.grad(lambda x: ours(x).sum()))(x)
    assert_trees_close((gradient,), torch_gradients(loss, x), rtol=1e-3, atol=1e-4)


def test_the_rest_of_the_program_is_jaxs():
    ours = torchleaf.torch_function(_with_a_function_of_its_own, engine="xla")
    jaxpr = str(jax.make_jaxpr(ours)(jnp.ones((3, 3))))
    assert jaxpr.count("torch_call[") == 1
    assert " sin" in jaxpr


def test_strict_names_the_op():
    strict = {"engine": "xla", "strict": True}
    with pytest.raises(torchleaf.TorchCallError, match=r"uses aten\.linalg_eig.*strict=True"):
        torchleaf.torch_function(_with_a_missing_op, **strict)(jnp.ones((3, 3)))
    with pytest.raises(torchleaf.TorchCallError, match=r"uses torch\.autograd\.Function Halved"):
        torchleaf.torch_function(_with_a_function_of_its_own, **strict)(jnp.ones(3))


def test_a_custom_op_is_carried():
    name = "torchleaf_tests_xla::triple"
    if not hasattr(torch.ops.torchleaf_tests_xla, "triple"):

        @torch.library.custom_op(name, mutates_args=())
        def triple(x: torch.Tensor) -> torch.Tensor:
            return 3 * x

        triple.register_fake(torch.empty_like)
        triple.register_autograd(lambda ctx, grad: 3 * grad)

    ours = torchleaf.torch_function(lambda x: torch.ops.torchleaf_tests_xla.triple(x) ** 2, engine="xla")
    assert_trees_close(ours(jnp.arange(3.0)), 9 * jnp.arange(3.0) ** 2)
    assert_trees_close(jax.grad(lambda x: ours(x).sum())(jnp.arange(3.0)), 18 * jnp.arange(3.0))
    assert carried_by(ours) == {f"{name}.default"}
