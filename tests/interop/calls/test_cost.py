"""Only what is asked for is computed: torch's ops are counted, and the shapes of what it makes inspected."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close
from watching import OpLog, Recorder

B, IN, OUT = 5, 3, 7


pytestmark = pytest.mark.usefixtures("no_proofs")


@pytest.fixture(params=["live", "recompute"])
def residuals(request):
    return request.param


def run(program, *args):
    return jax.block_until_ready(eqx.filter_jit(program)(*args))


# --- gradients of some operands, cotangents of some outputs --------------------------------------------


@pytest.mark.parametrize(("argnums", "products"), [(0, 1), (1, 1), ((0, 1), 2)], ids=["x", "w", "both"])
@pytest.mark.parametrize("forward_mode", [True, False])
def test_each_gradient_is_one_matmul(argnums, products, forward_mode, residuals, backward):
    matmul = torchleaf.torch_function(torch.matmul, residuals=residuals, forward_mode=forward_mode)
    x, w = twins.normal((B, IN), (IN, OUT))
    grads = run(jax.grad(lambda x, w: matmul(x, w).sum(), argnums), x, w)
    assert_trees_close(grads, jax.grad(lambda x, w: (x @ w).sum(), argnums)(x, w))
    assert backward.matmuls == products


def test_gradients_thrown_away_are_dead_code(residuals, backward):
    """Both are asked for, one is dropped: the compiled program never computes it."""
    matmul = torchleaf.torch_function(torch.matmul, residuals=residuals)
    x, w = twins.normal((B, IN), (IN, OUT))
    inner = jax.jit(jax.grad(lambda x, w: matmul(x, w).sum(), (0, 1)))
    assert_trees_close(run(lambda x, w: inner(x, w)[0], x, w), jnp.broadcast_to(w.sum(1), x.shape))
    assert backward.matmuls == 1


def test_outputs_the_loss_does_not_use_have_no_backward(residuals, backward):
    function = torchleaf.torch_function(lambda x, w, v: (x @ w, (x @ v).sin(), x.exp()), residuals=residuals)
    args = twins.normal((B, IN), (IN, OUT), (IN, OUT))
    run(jax.grad(lambda *xs: function(*xs)[0].sum()), *args)
    assert backward.matmuls == 1
    assert backward.counts["cos"] == 0


@pytest.mark.parametrize("inputs", [(0,), (1,), (0, 1)], ids=["x", "w", "both"])
def test_tangents_of_some_inputs(inputs):
    """Forward mode: the call of the function, then one of its derivative in the directions that move."""
    matmul = torchleaf.torch_function(torch.matmul)
    args = twins.normal((B, IN), (IN, OUT))

    def directional(*chosen):
        operands = dict(enumerate(args)) | dict(zip(inputs, chosen, strict=True))
        return matmul(operands[0], operands[1])

    jaxpr = jax.make_jaxpr(lambda *xs: jax.jvp(directional, xs, xs))(*(args[i] for i in inputs))
    calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "torch_call"]
    floats = [sum(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars) for eqn in calls]
    assert floats == [2, 2 + len(inputs)]


def test_calls_and_gradients_nobody_uses_do_not_run(residuals):
    recorder = Recorder(torch.sin)
    function = torchleaf.torch_function(recorder, residuals=residuals)
    (x,) = twins.normal((3,))
    assert_trees_close(run(lambda x: (function(x), x * 2)[1], x), x * 2)
    assert_trees_close(
        run(jax.grad(lambda x: x.sum() + 0 * jax.lax.stop_gradient(function(x)).shape[0]), x), jnp.ones(3)
    )
    assert recorder.computed == []


@pytest.mark.parametrize(("residuals", "forwards"), [("live", 1), ("recompute", 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_how_often_the_forward_runs(residuals, forwards, batched):
    """Once with the live graph, also under vmap; twice where the backward recomputes it."""
    recorder = Recorder(torch.sin)
    function = torchleaf.torch_function(recorder, residuals=residuals)
    function = jax.vmap(function) if batched else function
    run(jax.value_and_grad(lambda x: function(x).sum()), *twins.normal((B, 3)))
    assert len(recorder.computed) == forwards


# --- frozen parts of a model ---------------------------------------------------------------------------


class Head(eqx.Module):
    encoder: torchleaf.TorchModule
    head: torchleaf.TorchModule

    def __call__(self, x):
        return self.head(self.encoder(x))


def model(residuals):
    encoder = torch.nn.Sequential(torch.nn.Linear(IN, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6))
    return Head(
        torchleaf.TorchModule(encoder, residuals=residuals),
        torchleaf.TorchModule(torch.nn.Linear(6, OUT), residuals=residuals),
    )


def loss(model, x):
    return jnp.square(jax.vmap(model)(x)).mean()


def frozen_by_stop_gradient(model, x):
    arrays, static = eqx.partition(model.encoder, eqx.is_array)
    encoder = eqx.combine(jax.lax.stop_gradient(arrays), static)
    return loss(eqx.tree_at(lambda m: m.encoder, model, encoder), x)


@pytest.mark.long
def test_a_frozen_encoder_costs_no_backward(residuals, backward):
    """Training all: products for three weights and two activations. Training the head: for its weight alone."""
    (x,) = twins.normal((B, IN))
    both = model(residuals)
    everything = run(eqx.filter_grad(loss), both, x)
    assert backward.matmuls == 5
    backward.counts.clear()

    head = run(eqx.filter_grad(lambda head, rest: loss(eqx.combine(head, rest), x)), *split(both))
    assert_trees_close(head.head.params, everything.head.params)
    assert backward.matmuls == 1
    backward.counts.clear()

    stopped = run(eqx.filter_grad(frozen_by_stop_gradient), both, x)
    assert_trees_close(stopped.head.params, everything.head.params)
    assert_trees_close(stopped.encoder.params, jax.tree.map(jnp.zeros_like, everything.encoder.params))
    assert backward.matmuls == 1
    assert backward.counts["tanh_backward"] == 0


def split(model):
    """The trainable arrays of the head, and the rest."""
    spec = eqx.tree_at(lambda m: m.head, jax.tree.map(lambda _: False, model), torchleaf.trainable(model.head))
    return eqx.partition(model, spec)


def test_frozen_torch_parameters_cost_no_backward(residuals, backward):
    """`requires_grad_(False)` inside one torch module, the usual way of fine-tuning."""
    network = torch.nn.Sequential(torch.nn.Linear(IN, 4), torch.nn.Tanh(), torch.nn.Linear(4, OUT))
    network[0].requires_grad_(False)
    (x,) = twins.normal((B, IN))
    run(eqx.filter_grad(loss), torchleaf.TorchModule(network, residuals=residuals), x)
    assert backward.matmuls == 1
    assert backward.counts["tanh_backward"] == 0


def test_a_frozen_layer_above_a_trained_one_passes_gradients_through(residuals, backward):
    """Only its input's gradient, not its weight's."""
    matmul = torchleaf.torch_function(torch.matmul, residuals=residuals)
    x, a, b, c = twins.normal((B, IN), (IN, IN), (IN, IN), (IN, OUT))
    run(jax.grad(lambda b: matmul(matmul(matmul(x, a), b), c).sum()), b)
    assert backward.matmuls == 2


# --- batches -------------------------------------------------------------------------------------------

PER_EXAMPLE = {(B, OUT, IN), (B, IN, OUT)}


@pytest.fixture
def linear():
    return twins.normal((B, IN), (OUT, IN), (OUT,))


@pytest.mark.parametrize("method", ["auto", "vmap", "batched"])
def test_grad_of_vmap_makes_no_gradient_per_example(method, residuals, backward, linear):
    """One product for the weight, summed over the batch as it goes, as in native torch."""
    forward = OpLog()
    function = torchleaf.torch_function(
        forward.wrap(torch.nn.functional.linear), vmap_method=method, residuals=residuals
    )

    def total(w, b, x):
        return jnp.square(jax.vmap(function, (0, None, None))(x, w, b)).sum()

    x, w, b = linear
    grads = run(jax.grad(total, (0, 1)), w, b, x)
    assert_trees_close(grads, jax.grad(lambda w, b: jnp.square(x @ w.T + b).sum(), (0, 1))(w, b), rtol=1e-4)
    assert not PER_EXAMPLE & (backward.shapes | forward.shapes)
    assert backward.matmuls == 1
    assert forward.matmuls == (1 if residuals == "live" else 2)


def test_vmap_of_grad_does_make_one_per_example(backward, linear):
    """The counterpart, which shows that the test above would see them."""
    function = torchleaf.torch_function(torch.nn.functional.linear)
    x, w, b = linear
    grads = run(jax.vmap(jax.grad(lambda w, x: function(x, w, b).sum()), (None, 0)), w, x)
    assert grads.shape == (B, OUT, IN)
    assert PER_EXAMPLE & backward.shapes


def test_gradients_of_each_example_thrown_away_are_dead_code(backward, linear):
    function = torchleaf.torch_function(torch.nn.functional.linear)
    x, w, b = linear
    both = jax.jit(jax.vmap(jax.grad(lambda w, x: jnp.square(function(x, w, b)).sum(), (0, 1)), (None, 0)))
    run(lambda w, x: both(w, x)[1], w, x)
    assert backward.matmuls == 1


def test_grad_of_nested_vmap_makes_none_either(backward, linear):
    function = torchleaf.torch_function(torch.nn.functional.linear)
    _, w, b = linear
    (x,) = twins.normal((2, B, IN))
    twice = jax.vmap(jax.vmap(function, (0, None, None)), (0, None, None))
    run(jax.grad(lambda w: jnp.square(twice(x, w, b)).sum()), w)
    assert backward.matmuls == 1
    assert not any(shape[-2:] in {(OUT, IN), (IN, OUT)} for shape in backward.shapes if len(shape) > 2)


@pytest.mark.long
def test_second_order_over_a_batch_makes_none_either(linear, backward):
    """A Hessian-vector product over the weights of a batch."""
    function = torchleaf.torch_function(lambda x, w, b: torch.tanh(torch.nn.functional.linear(x, w, b)))
    x, w, b = linear

    def total(w):
        return jnp.square(jax.vmap(function, (0, None, None))(x, w, b)).sum()

    _, hvp = run(lambda w: jax.jvp(jax.grad(total), (w,), (w,)), w)

    def twin(w):
        return jnp.square(jnp.tanh(x @ w.T + b)).sum()

    assert_trees_close(hvp, jax.jvp(jax.grad(twin), (w,), (w,))[1], rtol=1e-4, atol=1e-5)
    assert not PER_EXAMPLE & backward.shapes
