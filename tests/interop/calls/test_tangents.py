"""Which inputs and outputs carry derivatives: argnums, integers and bools, unused ones, pytrees, keywords, has_aux."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit, torch_gradients


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4)


@eager_and_jit
@pytest.mark.parametrize("argnums", [0, 1, 2, (0,), (2, 0), (1, 2), (0, 1, 2)])
def test_argnums(argnums, jit):
    args = twins.LAYER.arguments()
    close(
        jit(jax.grad(lambda *xs: twins.LAYER.ours(*xs).sum(), argnums))(*args),
        jax.grad(lambda *xs: twins.LAYER.jax(*xs).sum(), argnums)(*args),
    )


@eager_and_jit
def test_gradients_equal_torch_backward(jit):
    args = twins.LAYER.arguments()
    grads = jit(jax.grad(lambda *xs: twins.LAYER.ours(*xs).sum(), (0, 1, 2)))(*args)
    assert_trees_close(grads, torch_gradients(lambda *xs: twins.LAYER.torch(*xs).sum(), *args), rtol=1e-6)


@eager_and_jit
def test_value_and_grad_with_aux_of_the_torch_call(jit):
    @torchleaf.torch_function
    def ours(x, w):
        y = x @ w
        return y.square().mean(), {"y": y, "largest": y.argmax(), "positive": y > 0, "name": "y"}

    def twin(x, w):
        y = x @ w
        return jnp.square(y).mean(), {"y": y, "largest": y.argmax(), "positive": y > 0}

    def arrays_only(x, w):
        value, aux = ours(x, w)
        assert aux.pop("name") == "y"
        return value, aux

    args = twins.normal((3, 4), (4, 2))
    for argnums in (0, (0, 1)):
        close(
            jit(jax.value_and_grad(arrays_only, argnums, has_aux=True))(*args),
            jax.value_and_grad(twin, argnums, has_aux=True)(*args),
        )
    close(jit(jax.grad(arrays_only, has_aux=True))(*args), jax.grad(twin, has_aux=True)(*args))


@eager_and_jit
def test_vjp_with_aux_and_partial_cotangents(jit):
    (x, y) = twins.SEVERAL.arguments()

    def of_one_output(function, x, y):
        outs, pull = jax.vjp(function, x, y)
        zeros = jax.tree.map(jnp.zeros_like, outs)
        return pull({**zeros, "pair": (jnp.ones_like(x), zeros["pair"][1])})

    close(jit(lambda x, y: of_one_output(twins.SEVERAL.ours, x, y))(x, y), of_one_output(twins.SEVERAL.jax, x, y))


# --- integers and bools ----------------------------------------------------------------------------


@torchleaf.torch_function
def pick(table, indices, mask):
    rows = torch.nn.functional.embedding(indices, table)
    return torch.where(mask[:, None], rows.sin(), rows), indices + 1, mask.logical_not()


def pick_jax(table, indices, mask):
    rows = table[indices]
    return jnp.where(mask[:, None], jnp.sin(rows), rows), indices + 1, ~mask


@pytest.fixture
def picked():
    return twins.normal((4, 2))[0], jnp.array([3, 0, 3]), jnp.array([True, False, False])


@eager_and_jit
def test_integer_and_bool_inputs_are_constants_of_grad(picked, jit):
    close(
        jit(jax.grad(lambda *xs: pick(*xs)[0].sum()))(*picked),
        jax.grad(lambda *xs: pick_jax(*xs)[0].sum())(*picked),
    )


@eager_and_jit
def test_allow_int_gives_float0(picked, jit):
    def grads(function):
        return jit(jax.grad(lambda *xs: function(*xs)[0].sum(), (0, 1, 2), allow_int=True))(*picked)

    close(grads(pick), grads(pick_jax))


def test_grad_of_an_integer_input_raises_as_in_jax(picked):
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda *xs: pick(*xs)[0].sum(), 1)(*picked)


@eager_and_jit
def test_vjp_gives_float0_cotangents(picked, jit):
    def cotangents(function):
        def run(*args):
            outs, pull = jax.vjp(function, *args)
            float0 = [np.zeros(y.shape, jax.dtypes.float0) for y in outs[1:]]
            return pull((jnp.cos(outs[0]), *float0))

        return jit(run)(*picked)

    close(cotangents(pick), cotangents(pick_jax))


def test_jvp_takes_and_gives_float0(picked):
    float0 = tuple(np.zeros(x.shape, jax.dtypes.float0) for x in picked[1:])
    tangents = (jnp.cos(picked[0]), *float0)
    close(jax.jvp(pick, picked, tangents), jax.jvp(pick_jax, picked, tangents))


@eager_and_jit
def test_only_integer_outputs_have_no_derivative(picked, jit):
    def both(function):
        return jit(jax.grad(lambda x: x.sum() * function(x).sum()))(picked[0])

    close(both(torchleaf.torch_function(lambda x: x.argmax(0))), both(lambda x: x.argmax(0)))


@eager_and_jit
def test_integer_outputs_feed_on(jit):
    """An index computed in torch selects in JAX, and its use does not disturb the gradient."""

    def both(argsort):
        return jit(jax.value_and_grad(lambda x: (x[argsort(x)] * jnp.arange(5.0)).sum()))(twins.normal((5,))[0])

    close(both(torchleaf.torch_function(torch.argsort)), both(jnp.argsort))


# --- dependence ------------------------------------------------------------------------------------


@torchleaf.torch_function
def partly(x, y, unused):
    return x.sin(), torch.ones(2) * 3, y.detach().exp()


def partly_jax(x, y, unused):
    return jnp.sin(x), jnp.ones(2) * 3, jnp.exp(jax.lax.stop_gradient(y))


PARTLY = {
    "grad": lambda f, *xs: jax.grad(lambda *xs: sum(y.sum() for y in f(*xs)), (0, 1, 2))(*xs),
    "jacrev": lambda f, *xs: jax.jacrev(f, (0, 1, 2))(*xs),
    "jacfwd": lambda f, *xs: jax.jacfwd(f, (0, 1, 2))(*xs),
    "hessian": lambda f, *xs: jax.hessian(f, (0, 1, 2))(*xs),
    "jacrev twice": lambda f, *xs: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 2))(*xs),
    "jvp": lambda f, *xs: jax.jvp(f, xs, xs),
    "jvp of the unused": lambda f, x, y, z: jax.jvp(lambda z: f(x, y, z), (z,), (z,)),
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("transform", PARTLY.values(), ids=PARTLY)
def test_unused_inputs_constant_and_detached_outputs(transform, jit):
    args = twins.normal((3,), (2,), (4,))
    close(jit(lambda *xs: transform(partly, *xs))(*args), jax.jit(lambda *xs: transform(partly_jax, *xs))(*args))


@pytest.mark.long
@eager_and_jit
def test_one_array_as_several_arguments(jit):
    """`f(x, x)`: the two uses are told apart."""

    def both(f):
        x = twins.normal((3,))[0]

        def directional(x):
            return jax.jvp(f, (x, x), (x, 2 * x))[1].sum()

        return jit(lambda x: (jax.grad(lambda x: f(x, x).sum())(x), jax.grad(directional)(x), jax.hessian(f)(x, x)))(x)

    close(both(torchleaf.torch_function(lambda a, b: a.sin() * b**2)), both(lambda a, b: jnp.sin(a) * b**2))


@eager_and_jit
def test_an_output_that_is_an_input(jit):
    def both(f):
        x, y = twins.normal((3,), (3,))
        return jit(jax.jacrev(f, (0, 1)))(x, y)

    close(
        both(torchleaf.torch_function(lambda x, y: (x, x * y, y.view(3, 1)))), both(lambda x, y: (x, x * y, y[:, None]))
    )


# --- pytrees and keywords --------------------------------------------------------------------------


@torchleaf.torch_function
def dense(params, x, *, scale, power=2, extra=None):
    y = sum(x @ w + b for w, b in params["layers"]) * scale
    return {"y": y**power, "rest": (params["shift"] * y.sum(), extra)}


def dense_jax(params, x, *, scale, power=2, extra=None):
    y = sum(x @ w + b for w, b in params["layers"]) * scale
    return {"y": y**power, "rest": (params["shift"] * y.sum(), extra)}


@pytest.fixture
def tree():
    w, v, b, c, shift, x, scale = twins.normal((3, 2), (3, 2), (2,), (2,), (4,), (5, 3), (2,))
    return {"layers": [(w, b), (v, c)], "shift": shift}, x, scale


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("power", [2, 3])
def test_pytrees_and_keyword_arrays(tree, power, jit):
    def grads(function):
        def loss(params, x, scale):
            out = function(params, x, scale=scale, power=power)
            assert out["rest"][1] is None
            return out["y"].sum() + jnp.sin(out["rest"][0]).sum()

        return jit(jax.value_and_grad(loss, (0, 1, 2)))(*tree)

    close(grads(dense), grads(dense_jax))


@pytest.mark.long
@eager_and_jit
def test_keyword_array_alone_is_differentiated(tree, jit):
    params, x, scale = tree

    def derivatives(function):
        def of_scale(s):
            return function(params, x, scale=s, extra=s)

        return jit(lambda s: (jax.jacfwd(of_scale)(s), jax.jacrev(of_scale)(s), jax.jvp(of_scale, (s,), (s,))))(scale)

    assert_trees_close(derivatives(dense), derivatives(dense_jax), rtol=1e-4, atol=1e-5)


# --- other floating dtypes -------------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gradients_keep_their_dtype(dtype, jit):
    x, w = (a.astype(dtype) for a in twins.normal((3,), (3, 3)))

    def derivatives(function):
        return jit(
            lambda x, w: (jax.grad(lambda *a: function(*a).sum(), (0, 1))(x, w), jax.jvp(function, (x, w), (x, w)))
        )(x, w)

    assert_trees_close(
        derivatives(torchleaf.torch_function(lambda x, w: torch.sin(w @ x))),
        derivatives(lambda x, w: jnp.sin(w @ x)),
        rtol=5e-2,
        atol=5e-2,
    )


@eager_and_jit
def test_mixed_dtypes(jit):
    (x,), w = twins.normal((3,)), twins.normal((3,), seed=1)[0].astype(jnp.bfloat16)

    def derivatives(function):
        return jit(jax.jacrev(function, (0, 1)))(x, w)

    assert_trees_close(
        derivatives(torchleaf.torch_function(lambda x, w: (x * w, w.float().sum(), x.to(torch.bfloat16)))),
        derivatives(lambda x, w: (x * w, w.astype(jnp.float32).sum(), x.astype(jnp.bfloat16))),
        rtol=1e-2,
    )


@pytest.mark.long
def test_float64(x64):
    x, w = (a.astype(jnp.float64) for a in twins.normal((3,), (3, 3)))

    def derivatives(function):
        return jax.jit(lambda x, w: (function(x, w), jax.hessian(function, (0, 1))(x, w)))(x, w)

    assert_trees_close(
        derivatives(torchleaf.torch_function(lambda x, w: torch.sin(w @ x))),
        derivatives(lambda x, w: jnp.sin(w @ x)),
        rtol=1e-12,
        atol=1e-14,
    )
