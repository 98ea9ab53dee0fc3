"""`vmap_method`: auto, vmap, batched and loop give equal results and derivatives; what each refuses."""

import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit, from_torch, repeated_jit
from watching import Recorder

METHODS = ("auto", "vmap", "batched", "loop")


def layer(method):
    return torchleaf.torch_function(twins.LAYER.torch, vmap_method=method)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=2e-4, atol=1e-5)


def of_inputs(function, *args):
    """Only `x` is batched."""
    return jax.vmap(function, (0, None, None))(*args)


def losses(function):
    return lambda *args: jnp.sin(of_inputs(function, *args)).sum()


DERIVATIVES = {
    "value": of_inputs,
    "grad of vmap": lambda f, *args: jax.grad(losses(f), (0, 1, 2))(*args),
    "vmap of grad": lambda f, *args: of_inputs(jax.grad(lambda *xs: jnp.sin(f(*xs)).sum(), (0, 1, 2)), *args),
    "jvp of vmap": lambda f, *args: jax.jvp(lambda *xs: of_inputs(f, *xs), args, args),
    "vmap of jvp": lambda f, *args: of_inputs(lambda *xs: jax.jvp(f, xs, xs), *args),
    "hessian of vmap": lambda f, *args: jax.hessian(losses(f), (0, 2))(*args),
    "vmap of hessian": lambda f, *args: of_inputs(jax.hessian(f, (0, 2)), *args),
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transform", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_method_gives_the_same(transform, method, jit):
    args = twins.normal((4, 3), (2, 3), (2,))
    actual = jit(lambda *xs: transform(layer(method), *xs))(*args)
    close(actual, jax.jit(lambda *xs: transform(twins.LAYER.jax, *xs))(*args))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_other_axes_and_nesting(method):
    """Inputs batched twice, at inner and last axes; the output axis last."""
    args = twins.normal((3, 5, 4), (2, 3), (2,))

    def twice(function):
        inner = jax.vmap(function, (1, None, None))
        return jax.vmap(inner, (-1, None, None), -1)

    function = torchleaf.torch_function(lambda x, w, b: torch.tanh(x @ w.T + b), vmap_method=method)
    close(jax.jit(twice(function))(*args), twice(twins.LAYER.jax)(*args))

    def grads(function):
        return jax.grad(lambda *xs: jnp.sin(twice(function)(*xs)).sum(), (0, 1, 2))(*args)

    close(grads(function), grads(twins.LAYER.jax))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(method, size):
    args = twins.normal((size, 3), (2, 3), (2,))
    close(of_inputs(layer(method), *args), of_inputs(twins.LAYER.jax, *args))
    close(jax.grad(losses(layer(method)), (0, 1))(*args), jax.grad(losses(twins.LAYER.jax), (0, 1))(*args))


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_weights(method):
    """A function that batches natively over every argument takes them all batched."""

    def ours(x, w):
        return (x * w).sin()

    args = twins.normal((4, 3), (3, 4))
    function = jax.vmap(torchleaf.torch_function(ours, vmap_method=method), (0, 1))
    twin = jax.vmap(lambda x, w: jnp.sin(x * w), (0, 1))
    close(function(*args), twin(*args))
    close(jax.jacrev(function, (0, 1))(*args), jax.jacrev(twin, (0, 1))(*args))


# --- recurrent layers, which torch.func.vmap refuses ------------------------------------------------


@pytest.fixture(params=[torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN], ids=["LSTM", "GRU", "RNN"])
def recurrent(request):
    """A layer for sequences `(time, 3)`, which takes `(batch, time, 3)` as well."""
    return request.param(3, 4, batch_first=True)


def outputs(model, x):
    return jax.vmap(lambda x: model(x)[0])(x)


def gradients(model, x):
    return eqx.filter_grad(lambda m: jnp.square(outputs(m, x)).sum())(model).params


@eager_and_jit
@pytest.mark.parametrize("method", ["batched", "loop"])
def test_recurrent_layers(recurrent, method, jit):
    model = torchleaf.TorchModule(recurrent, vmap_method=method)
    (x,) = twins.normal((5, 6, 3))
    expected = recurrent(torch.tensor(np.asarray(x)))[0]
    close(jit(lambda x: outputs(model, x))(x), from_torch(expected))

    expected.square().sum().backward()
    grads = eqx.filter_jit(gradients)(model, x) if jit is repeated_jit else gradients(model, x)
    close(grads, from_torch({name: p.grad for name, p in recurrent.named_parameters()}))


@pytest.mark.long
def test_auto_falls_back_to_a_loop_with_one_warning_naming_the_op(recurrent):
    model = torchleaf.TorchModule(recurrent)
    x, y = twins.normal((5, 6, 3), (7, 6, 3))
    run = eqx.filter_jit(outputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(model, x), run(model, y), gradients(model, x)
    assert len(caught) == 1, [str(w.message) for w in caught]
    message = str(caught[0].message)
    assert re.search(op_of(recurrent), message), message
    assert "loop over 5" in message
    assert "vmap_method='batched'" in message
    loop = torchleaf.TorchModule(recurrent, vmap_method="loop")
    close(actual, (outputs(loop, x), outputs(loop, y), gradients(loop, x)))


def test_vmap_refuses_what_torch_cannot_batch(recurrent):
    with pytest.raises(torchleaf.interop.TorchCallError) as caught:
        outputs(torchleaf.TorchModule(recurrent, vmap_method="vmap"), twins.normal((5, 6, 3))[0])
    message = str(caught.value)
    assert re.search(op_of(recurrent), message), message
    assert all(f"'{method}'" in message for method in ("auto", "loop", "batched"))


def op_of(layer):
    return rf"aten::\S*{type(layer).__name__.lower()}"


def test_auto_does_not_warn_where_torch_can_batch():
    args = twins.LAYER.arguments(lead=(4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(layer("auto"))(*args)


# --- batched ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "shape", "called_with"),
    [
        (lambda f: jax.vmap(f), (4, 3), (4, 3)),
        (lambda f: jax.vmap(f, -1), (3, 4), (4, 3)),
        (lambda f: jax.vmap(jax.vmap(f, 1), 2), (3, 5, 4), (20, 3)),
        (lambda f: jax.vmap(lambda x: f(x) * 2), (1, 3), (1, 3)),
    ],
    ids=["first axis", "last axis", "nested", "single"],
)
def test_batched_calls_once_with_the_batch_leading(transform, shape, called_with):
    recorder = Recorder(torch.sin)
    function = torchleaf.torch_function(recorder, vmap_method="batched")
    (x,) = twins.normal(shape)
    close(jax.jit(transform(function))(x), transform(jnp.sin)(x))
    assert recorder.computed == [called_with]


def test_grad_of_batched_calls_the_forward_once():
    recorder = Recorder(torch.sin)
    function = torchleaf.torch_function(recorder, vmap_method="batched")
    (x,) = twins.normal((4, 3))
    close(jax.jit(jax.grad(lambda x: jax.vmap(function)(x).sum()))(x), jnp.cos(x))
    assert set(recorder.computed) == {(4, 3)}


@eager_and_jit
def test_batched_refuses_a_function_that_mixes_the_batch(jit):
    function = torchleaf.torch_function(lambda x: x.sum(), vmap_method="batched")
    with pytest.raises(Exception, match="expected") as caught:
        jax.block_until_ready(jit(jax.vmap(function))(twins.normal((4, 3))[0]))
    assert "vmap_method='batched'" in str(caught.value)
    assert "does not treat a leading axis as a batch" in str(caught.value)
    assert "vmap_method='auto'" in str(caught.value)


def test_batched_shares_what_is_not_batched():
    """The weights arrive as they are, so one matmul serves the batch."""
    recorder = Recorder(torch.matmul)
    x, w = twins.normal((4, 3), (3, 2))
    ours = torchleaf.torch_function(recorder, vmap_method="batched")
    close(jax.vmap(ours, (0, None))(x, w), x @ w)
    assert recorder.computed == [((4, 3), (3, 2))]


# --- loop ------------------------------------------------------------------------------------------


def test_loop_runs_example_by_example():
    recorder = Recorder(torch.sin)
    (x,) = twins.normal((4, 3))
    close(jax.vmap(torchleaf.torch_function(recorder, vmap_method="loop"))(x), jnp.sin(x))
    assert recorder.computed == [(3,)] * 4


@eager_and_jit
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_functions_that_read_values_run_as_a_loop(method, jit):
    """Control flow on values, per example; derivatives too."""

    def ours(x):
        return x.sin() if x.sum().item() > 0 else x**2

    def twin(x):
        return jnp.where(x.sum() > 0, jnp.sin(x), x**2)

    def both(function):
        batch = jax.vmap(function)
        return jit(lambda x: (batch(x), jax.grad(lambda x: batch(x).sum())(x), jax.jvp(batch, (x,), (x,))))(
            twins.normal((6, 3))[0]
        )

    out_shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it reads values")
        actual = both(torchleaf.torch_function(ours, vmap_method=method, out_shape=out_shape))
    close(actual, both(twin))


@pytest.mark.parametrize("method", ["Auto", "sequential", None, ""])
def test_unknown_methods(method):
    with pytest.raises(Exception, match="vmap_method"):
        torchleaf.torch_function(torch.sin, vmap_method=method)
