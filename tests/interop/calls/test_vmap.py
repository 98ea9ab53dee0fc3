"""`jax.vmap` of torch functions, under and over derivatives, equals that of their JAX twins."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.both_engines(every=4)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=2e-4, atol=1e-5)


def total(function):
    """A scalar of all outputs, not symmetric in them."""
    return lambda *args: sum((i + 1) * jnp.sin(y).sum() for i, y in enumerate(jax.tree.leaves(function(*args))))


def with_axes(args, in_axes, size):
    """`args` with an axis of `size` where `in_axes` says, filled with different examples."""
    shapes = [
        x.shape if a is None else (*x.shape[: a % (x.ndim + 1)], size, *x.shape[a % (x.ndim + 1) :])
        for x, a in zip(args, in_axes, strict=True)
    ]
    return twins.normal(*shapes, seed=size)


# --- axes ------------------------------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize("out_axes", [0, 1, -1])
@pytest.mark.parametrize(
    "in_axes",
    [(0, None, None), (1, None, None), (-1, None, None), (0, 0, 0), (None, 1, -1), (-1, -2, 1), (None, 2, None)],
)
def test_in_and_out_axes(in_axes, out_axes, jit):
    args = with_axes(twins.LAYER.arguments(), in_axes, 4)
    close(
        jit(jax.vmap(twins.LAYER.ours, in_axes, out_axes))(*args),
        jax.vmap(twins.LAYER.jax, in_axes, out_axes)(*args),
    )


@st.composite
def batched_products(draw):
    """Shapes for `einsum("ij,jk->ik", x, y)`, an axis in some argument, and an output axis."""
    i, j, k, size = (draw(st.integers(0, 4)) for _ in range(4))
    in_axes = draw(st.tuples(*[st.none() | st.integers(-3, 2)] * 2).filter(any_batched))
    return ((i, j), (j, k)), in_axes, draw(st.integers(-3, 2)), size


def any_batched(axes):
    return any(a is not None for a in axes)


@torchleaf.torch_function
def product(x, y):
    return {"product": x @ y, "row": (x.sin().sum(), y.cos())}


def product_jax(x, y):
    return {"product": x @ y, "row": (jnp.sin(x).sum(), jnp.cos(y))}


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True)
@given(batched_products())
def test_any_shapes_and_axes(case):
    shapes, in_axes, out_axis, size = case
    args = with_axes([jnp.zeros(s) for s in shapes], in_axes, size)
    out_axes = {"product": out_axis, "row": (0, 1)}
    close(jax.vmap(product, in_axes, out_axes)(*args), jax.vmap(product_jax, in_axes, out_axes)(*args))

    def grads(function):
        return jax.grad(lambda *xs: total(jax.vmap(function, in_axes, out_axes))(*xs), (0, 1))(*args)

    close(grads(product), grads(product_jax))


@eager_and_jit
def test_nested(jit):
    """Three axes, each over other arguments and at other places."""

    def thrice(function):
        inner = jax.vmap(function, (0, None, None), -1)
        middle = jax.vmap(inner, (1, 0, None), 1)
        return jax.vmap(middle, (None, 2, 1), 0)

    x, w, b = twins.normal((4, 5, 3), (5, 2, 6, 3), (2, 6))
    close(jit(thrice(twins.LAYER.ours))(x, w, b), thrice(twins.LAYER.jax)(x, w, b))
    close(
        jit(jax.grad(total(thrice(twins.LAYER.ours)), (0, 1, 2)))(x, w, b),
        jax.grad(total(thrice(twins.LAYER.jax)), (0, 1, 2))(x, w, b),
    )


@eager_and_jit
def test_integers_bools_and_constant_outputs(jit):
    def both(function):
        args = (
            twins.normal((4, 3))[0],
            jnp.array([[2, 0], [1, 1], [0, 2], [2, 2]]),
            jnp.array([True, False, True, True]),
        )
        return jit(jax.vmap(function))(*args)

    def ours(x, index, flag):
        return x[index], index + 1, torch.where(flag, x, -x), torch.ones(2), flag.logical_not()

    def twin(x, index, flag):
        return x[index], index + 1, jnp.where(flag, x, -x), jnp.ones(2), ~flag

    close(both(torchleaf.torch_function(ours)), both(twin))


def test_axis_name_does_not_disturb():
    """A torch call between collectives of a named vmap axis."""

    def both(function):
        def normalised(x):
            return function(x - jax.lax.pmean(x, "batch"), jax.lax.psum(x, "batch"))

        return jax.jit(jax.vmap(jax.value_and_grad(lambda x: total(normalised)(x)), axis_name="batch"))(
            twins.normal((5, 3))[0]
        )

    close(both(torchleaf.torch_function(lambda x, s: x.sin() * s)), both(lambda x, s: jnp.sin(x) * s))


def test_spmd_axis_name_has_no_effect_without_a_mesh_axis_in_use():
    args = twins.LAYER.arguments(lead=(4,))
    close(
        jax.vmap(twins.LAYER.ours, spmd_axis_name="data")(*args),
        jax.vmap(twins.LAYER.jax, spmd_axis_name="data")(*args),
    )


# --- derivatives -----------------------------------------------------------------------------------

SHARED_WEIGHTS, PER_EXAMPLE, OVER_WEIGHTS = (0, None, None), (0, 0, 0), (None, 0, 0)


def vjp_of_vmap(function, in_axes, *args):
    outs, pull = jax.vjp(jax.vmap(function, in_axes), *args)
    return pull(jnp.cos(outs))


def vmap_of_vjp(function, in_axes, *args):
    def pulled(*xs):
        outs, pull = jax.vjp(function, *xs)
        return pull(jnp.cos(outs))

    return jax.vmap(pulled, in_axes)(*args)


def vmap_of_hvp(function, in_axes, *args):
    def hvp(*xs):
        return jax.jvp(jax.grad(total(function), (0, 1, 2)), xs, xs)

    return jax.vmap(hvp, in_axes)(*args)


def grad_through_vmap_of_jvp(function, in_axes, *args):
    """In both the primals and the tangents."""

    def loss(primals, tangents):
        return total(jax.vmap(lambda p, t: jax.jvp(function, p, t), (in_axes, in_axes)))(primals, tangents)

    return jax.grad(loss, (0, 1))(args, tuple(jnp.cos(x) for x in args))


def grad_through_vmap_of_vjp(function, in_axes, *args):
    """In the primals and the cotangents, which some of the batch share."""

    def pulled(cotangent, *xs):
        return jax.vjp(function, *xs)[1](cotangent)

    cotangent = jnp.array([0.3, -2.0])
    return jax.grad(total(jax.vmap(pulled, (None, *in_axes))), (0, 1, 2, 3))(cotangent, *args)


def vmap_of_linearized(function, in_axes, *args):
    """The tangents are batched, the point is not; then its transpose."""
    point = tuple(x if a is None else jnp.take(x, 0, a) for x, a in zip(args, in_axes, strict=True))
    pushforward = jax.vmap(jax.linearize(function, *point)[1], in_axes)
    outs = pushforward(*args)
    return outs, jax.linear_transpose(pushforward, *args)(jnp.cos(outs))


DERIVATIVES = {
    "grad of vmap": lambda f, ax, *args: jax.grad(total(jax.vmap(f, ax)), (0, 1, 2))(*args),
    "vmap of grad": lambda f, ax, *args: jax.vmap(jax.grad(total(f), (0, 1, 2)), ax)(*args),
    "vmap of grad of the shared": lambda f, ax, *args: jax.vmap(jax.grad(total(f), 1), ax)(*args),
    "vjp of vmap": vjp_of_vmap,
    "vmap of vjp": vmap_of_vjp,
    "jvp of vmap": lambda f, ax, *args: jax.jvp(jax.vmap(f, ax), args, args),
    "vmap of jvp": lambda f, ax, *args: jax.vmap(lambda *xs: jax.jvp(f, xs, xs), ax)(*args),
    "vmap of jacrev": lambda f, ax, *args: jax.vmap(jax.jacrev(f, (0, 2)), ax)(*args),
    "vmap of hessian": lambda f, ax, *args: jax.vmap(jax.hessian(f, (0, 2)), ax)(*args),
    "hessian of vmap": lambda f, ax, *args: jax.hessian(total(jax.vmap(f, ax)), (0, 2))(*args),
    "vmap of hvp": vmap_of_hvp,
    "grad through vmap of jvp": grad_through_vmap_of_jvp,
    "grad through vmap of vjp": grad_through_vmap_of_vjp,
    "vmap of linearized": vmap_of_linearized,
}


@eager_and_jit
@pytest.mark.parametrize(
    "in_axes", [SHARED_WEIGHTS, PER_EXAMPLE, OVER_WEIGHTS], ids=["shared", "per example", "weights"]
)
@pytest.mark.parametrize("transform", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives(transform, in_axes, jit):
    args = with_axes(twins.LAYER.arguments(), in_axes, 4)
    actual = jit(lambda *xs: transform(twins.LAYER.ours, in_axes, *xs))(*args)
    close(actual, jax.jit(lambda *xs: transform(twins.LAYER.jax, in_axes, *xs))(*args))


@eager_and_jit
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("transform", ["grad of vmap", "vmap of grad", "jvp of vmap", "vmap of hessian"])
def test_empty_and_single_batches(transform, size, jit):
    transform, in_axes = DERIVATIVES[transform], SHARED_WEIGHTS
    args = with_axes(twins.LAYER.arguments(), in_axes, size)
    actual = jit(lambda *xs: transform(twins.LAYER.ours, in_axes, *xs))(*args)
    close(actual, transform(twins.LAYER.jax, in_axes, *args))


@pytest.mark.long
@eager_and_jit
def test_derivatives_between_two_vmaps(jit):
    """Per-example gradients of each member of an ensemble, and the gradient of their norm."""

    def penalty(function):
        per_example = jax.vmap(jax.grad(total(function), 1), (0, None, None))
        ensemble = jax.vmap(per_example, (None, 0, 0))
        return lambda x, w, b: jnp.square(ensemble(x, w, b)).sum()

    args = twins.normal((5, 3), (2, 2, 3), (2, 2))
    close(
        jit(jax.value_and_grad(penalty(twins.LAYER.ours), (0, 1, 2)))(*args),
        jax.value_and_grad(penalty(twins.LAYER.jax), (0, 1, 2))(*args),
    )
