"""Second derivatives through a `torch.autograd.Function`: right, or refused where torch itself has them wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchleaf import torch_function

X, V = jnp.linspace(-1, 1.5, 5), jnp.array([1.0, -2.0, 0.5, 3.0, -1.0])


class _Sine(torch.autograd.Function):
    """Its `keep` says what of the forward's values the backward, `slope`, has."""

    @classmethod
    def forward(cls, ctx, x):
        y = x.sin()
        cls.keep(ctx, x, y)
        return y

    @classmethod
    def backward(cls, ctx, gradient):
        return gradient * cls.slope(ctx)


class SavedInput(_Sine):
    keep = staticmethod(lambda ctx, x, y: ctx.save_for_backward(x))
    slope = staticmethod(lambda ctx: ctx.saved_tensors[0].cos())


class SavedOutput(_Sine):
    """The cosine from the sine, with its sign, a constant."""

    keep = staticmethod(lambda ctx, x, y: ctx.save_for_backward(y, x.cos().sign()))
    slope = staticmethod(lambda ctx: (1 - ctx.saved_tensors[0] ** 2).sqrt() * ctx.saved_tensors[1])


class SavedIntermediate(_Sine):
    keep = staticmethod(lambda ctx, x, y: ctx.save_for_backward(x.cos()))
    slope = staticmethod(lambda ctx: ctx.saved_tensors[0])


class AttributeIntermediate(_Sine):
    keep = staticmethod(lambda ctx, x, y: setattr(ctx, "slope", x.cos()))
    slope = staticmethod(lambda ctx: ctx.slope)


class IntermediateInAList(_Sine):
    """Beside the input, which is all that is saved as it should be."""

    keep = staticmethod(lambda ctx, x, y: (ctx.save_for_backward(x), setattr(ctx, "parts", [(x.cos(), 1)])))
    slope = staticmethod(lambda ctx: ctx.parts[0][0] + 0 * ctx.saved_tensors[0])


class DetachedInput(_Sine):
    keep = staticmethod(lambda ctx, x, y: setattr(ctx, "x", x.detach()))
    slope = staticmethod(lambda ctx: ctx.x.cos())


RIGHT = [SavedInput, SavedOutput]
WRONG = [SavedIntermediate, AttributeIntermediate, IntermediateInAList, DetachedInput]


def _slope(f):
    return lambda x: jax.jvp(f, (x,), (V,))[1]


def _by_gradient(f):
    return lambda x: (jax.grad(f)(x) * V).sum()


SECOND = {
    "forward over reverse": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (V,))[1],
    "reverse over reverse": lambda f: jax.grad(_by_gradient(f)),
    "reverse over forward": lambda f: jax.grad(_slope(f)),
    "hessian": lambda f: lambda x: jax.hessian(f)(x) @ V,
    "jacrev twice": lambda f: lambda x: jax.jacrev(jax.jacrev(f))(x) @ V,
    "under vmap": lambda f: lambda x: jax.vmap(jax.grad(_by_gradient(f)))(jnp.stack([2 * x, x]))[1],
}
each_second = pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
bound_or_not = pytest.mark.parametrize("bound", [False, True], ids=["", "bound before"])
each_jit = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])


def _total(function, *, bound=False):
    apply = function.apply
    return torch_function(lambda x: ((apply if bound else function.apply)(x * 1) ** 2).sum(), vmap_method="loop")


def _close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.long
@bound_or_not
@each_jit
@each_second
@pytest.mark.parametrize("function", RIGHT)
def test_what_saves_inputs_and_outputs_is_right(function, second, jit, bound):
    f = _total(function, bound=bound)
    for factor in (1, 0.5, -0.7):
        _close(jit(second(f))(factor * X), second(lambda x: (jnp.sin(x) ** 2).sum())(factor * X))


@bound_or_not
@each_jit
@each_second
@pytest.mark.parametrize("function", WRONG)
def test_what_saves_anything_else_is_refused(function, second, jit, bound):
    """It is named, with a remedy, each time; its gradients are right."""
    run = jit(second(_total(function, bound=bound)))
    for _ in range(2):
        with pytest.raises(Exception, match=rf"gradient of {function.__name__}, .* inputs and outputs, .* by ops"):
            jax.block_until_ready(run(X))
    _close(jit(jax.grad(_total(function, bound=bound)))(X), jnp.sin(2 * X))
    _close(jit(_slope(_total(function, bound=bound)))(X), (jnp.sin(2 * X) * V).sum())


def test_a_function_that_is_bound_before_is_refused():
    """As most users write it. In torch 2.15 no Python is met on the way."""
    with pytest.raises(Exception, match="gradient of SavedIntermediate"):
        jax.block_until_ready(jax.hessian(_total(SavedIntermediate, bound=True))(X))


def test_linear_functions_keep_what_they_like():
    """The scale of a gradient, as in reversed gradients, is a constant by all means."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.scale = scale.detach()
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return -ctx.scale * gradient, None

    f = torch_function(lambda x: (Reversed.apply(x.sin(), torch.tensor(0.5)) ** 2).sum(), vmap_method="loop")
    reversed_ = -0.5 * jnp.cos(X) * (-jnp.cos(X)) - 0.5 * 2 * jnp.sin(X) * -jnp.sin(X)
    _close(jax.jvp(jax.grad(f), (X,), (V,))[1], reversed_ * V)


def test_kinks_prove_nothing():
    """Finite differences that depend on the step tell no derivative."""

    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.inside = (x.abs() <= 1).to(x.dtype)
            return x.clamp(-1, 1)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.inside

    f = torch_function(lambda x: (Clipped.apply(x * 1) ** 2).sum(), vmap_method="loop")
    x = jnp.array([-2.0, -1.0, 0.5, 1.0, 3.0])  # at the kinks, too
    _close(jax.jvp(jax.grad(f), (x,), (V,))[1], jnp.array([0.0, 2.0, 2.0, 2.0, 0.0]) * V)


@pytest.mark.long
def test_what_does_not_show_in_the_result_is_no_reason_to_refuse():
    """A function of the wrong kind that a sum does not depend on, and one whose matrix is symmetric."""
    f = torch_function(lambda x: (x.sin() ** 2).sum() + 0 * SavedIntermediate.apply(x * 1).sum())
    _close(jax.jvp(jax.grad(f), (X,), (V,))[1], 2 * jnp.cos(2 * X) * V)
    g = torch_function(lambda x: (x.sin() ** 2).sum() + SavedIntermediate.apply(x * 1).detach().sum())
    _close(jax.grad(_by_gradient(g))(X), 2 * jnp.cos(2 * X) * V)
