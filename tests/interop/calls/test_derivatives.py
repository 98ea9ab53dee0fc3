"""Every JAX derivative of a torch function equals that of its JAX twin, eager and jitted."""

import jax
import jax.numpy as jnp
import pytest
import twins
from compare import assert_trees_close, eager_and_jit

pytestmark = pytest.mark.both_engines(every=4)


def total(function):
    """A scalar of all outputs, not symmetric in them."""

    def loss(*args):
        return sum((i + 1) * jnp.sin(y).sum() for i, y in enumerate(jax.tree.leaves(function(*args))))

    return loss


def pullback(function, *args):
    outs, vjp = jax.vjp(function, *args)
    return outs, vjp(jax.tree.map(jnp.cos, outs))


def linearized(function, *args):
    outs, pushforward = jax.linearize(function, *args)
    once = pushforward(*tangents(args))
    return outs, once, pushforward(*args)


def transposed(function, *args):
    outs, pushforward = jax.linearize(function, *args)
    return jax.linear_transpose(pushforward, *args)(jax.tree.map(jnp.cos, outs))


def tangents(args):
    return tuple(jnp.cos(3 * x) for x in args)


def argnums(args):
    return tuple(range(len(args)))


def forward_over_reverse(function, *args):
    return jax.jvp(jax.grad(total(function), argnums(args)), args, tangents(args))


def reverse_over_forward(function, *args):
    def directional(*xs):
        return jax.jvp(total(function), xs, tangents(args))[1]

    return jax.grad(directional, argnums(args))(*args)


def reverse_over_reverse(function, *args):
    def slope(*xs):
        grads = jax.grad(total(function), argnums(args))(*xs)
        return sum(jnp.vdot(g, t) for g, t in zip(grads, tangents(args), strict=True))

    return jax.grad(slope, argnums(args))(*args)


def forward_over_forward(function, *args):
    def inner(*xs):
        return jax.jvp(function, xs, tangents(args))

    return jax.jvp(inner, args, tangents(args))


def third_order(function, *args):
    """The gradient of a curvature: reverse over forward over reverse."""

    def curvature(*xs):
        _, hvp = jax.jvp(jax.grad(total(function), argnums(args)), xs, tangents(args))
        return sum(jnp.vdot(h, t) for h, t in zip(hvp, tangents(args), strict=True))

    return jax.grad(curvature, argnums(args))(*args)


def third_forward(function, *args):
    """Taylor coefficients along a line, forward all the way."""

    def line(s):
        return function(*(x + s * t for x, t in zip(args, tangents(args), strict=True)))

    return jax.jacfwd(jax.jacfwd(jax.jacfwd(line)))(0.5)


TRANSFORMS = {
    "call": lambda f, *args: f(*args),
    "grad": lambda f, *args: jax.grad(total(f), argnums(args))(*args),
    "grad of the last": lambda f, *args: jax.grad(total(f), len(args) - 1)(*args),
    "value_and_grad": lambda f, *args: jax.value_and_grad(total(f), (0,))(*args),
    "vjp": pullback,
    "jvp": lambda f, *args: jax.jvp(f, args, tangents(args)),
    "linearize": linearized,
    "linear_transpose": transposed,
    "jacfwd": lambda f, *args: jax.jacfwd(f, argnums(args))(*args),
    "jacrev": lambda f, *args: jax.jacrev(f, argnums(args))(*args),
    "hessian": lambda f, *args: jax.hessian(f, argnums(args))(*args),
    "jacrev of jacrev": lambda f, *args: jax.jacrev(jax.jacrev(total(f), argnums(args)), argnums(args))(*args),
    "jacrev of jacfwd": lambda f, *args: jax.jacrev(jax.jacfwd(f), len(args) - 1)(*args),
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "reverse over reverse": reverse_over_reverse,
    "forward over forward": forward_over_forward,
    "third order": third_order,
    "third order, forward": third_forward,
}


# Forward mode within forward mode within a batch of attention is beyond torch.func: a loop, with the warning.
@pytest.mark.filterwarnings("ignore:vmap of jvp.*_attention_torch.*runs as a loop:UserWarning")
@eager_and_jit
@pytest.mark.parametrize("twin", [twins.ATTENTION, twins.SEVERAL, twins.SCALAR], ids=["attention", "several", "scalar"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(transform, twin, jit):
    args = twin.arguments()
    actual = jit(lambda *xs: transform(twin.ours, *xs))(*args)
    expected = jax.jit(lambda *xs: transform(twin.jax, *xs))(*args)
    assert_trees_close(actual, expected, rtol=2e-4, atol=1e-5)
