"""`forward_mode=False`: reverse mode as ever, through `jax.custom_vjp`; forward mode raises JAX's own message."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit
from twins import Opaque, total


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(params=["live", "recompute"])
def reverse_only(request):
    return lambda function: torchleaf.torch_function(function, forward_mode=False, residuals=request.param)


REVERSE = {
    "grad": lambda f, *args: jax.grad(total(f), (0, 1, 2))(*args),
    "value_and_grad of one": lambda f, *args: jax.value_and_grad(total(f), 1)(*args),
    "jacrev": lambda f, *args: jax.jacrev(f, (0, 2))(*args),
    "vmap of grad": lambda f, x, w, b: jax.vmap(jax.grad(total(f), (0, 1)), (0, None, None))(jnp.stack([x, -x]), w, b),
    "grad of vmap": lambda f, x, w, b: jax.grad(lambda *xs: total(jax.vmap(f, (0, None, None)))(*xs), (0, 1, 2))(
        jnp.stack([x, -x]), w, b
    ),
    "scan": lambda f, x, w, b: jax.grad(
        lambda w: jax.lax.scan(lambda c, _: (c + total(f)(x, w, b), None), 0.0, length=3)[0]
    )(w),
    "checkpoint": lambda f, *args: jax.grad(total(jax.checkpoint(f)), (0, 1))(*args),
}


@eager_and_jit
@pytest.mark.parametrize("transform", REVERSE.values(), ids=REVERSE)
def test_reverse_only(transform, reverse_only, jit):
    args = twins.LAYER.arguments()
    ours = reverse_only(twins.LAYER.torch)
    close(jit(lambda *xs: transform(ours, *xs))(*args), jax.jit(lambda *xs: transform(twins.LAYER.jax, *xs))(*args))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, *args: jax.jvp(f, args, args),
        lambda f, *args: jax.jacfwd(f)(*args),
        lambda f, *args: jax.hessian(total(f))(*args),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
def test_reverse_only_refuses_forward_mode_as_jax_does(transform):
    args = twins.LAYER.arguments()
    ours = torchleaf.torch_function(twins.LAYER.torch, forward_mode=False)
    with pytest.raises(TypeError, match="forward-mode autodiff \\(jvp\\) to a custom_vjp function"):
        transform(ours, *args)


def test_reverse_only_with_integers_and_several_outputs(reverse_only):
    table, index = twins.normal((4, 2))[0], jnp.array([3, 0, 3])
    ours = reverse_only(lambda t, i: (torch.nn.functional.embedding(i, t).sin(), i + 1, t.sum(0)))

    def twin(t, i):
        return (jnp.sin(t[i]), i + 1, t.sum(0))

    def derivatives(f):
        def weighted(t, i):
            return (f(t, i)[0].sum() + 2 * f(t, i)[2].sum(), f(t, i)[1])

        return jax.jit(jax.value_and_grad(weighted, has_aux=True))(table, index)

    close(derivatives(ours), derivatives(twin))


def test_reverse_only_serves_code_that_torch_func_refuses(reverse_only):
    x, y = twins.normal((3,), (3,))
    close(
        jax.jit(jax.grad(total(reverse_only(Opaque.apply)), (0, 1)))(x, y),
        jax.grad(total(lambda x, y: x**2 * y), (0, 1))(x, y),
    )
