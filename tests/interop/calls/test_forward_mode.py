"""Forward mode and higher derivatives where torch has no formula for them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit, from_torch
from torch.nn import functional as F
from twins import Opaque, total


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


# --- ops without forward-mode formulas, each with a JAX twin -------------------------------------------


class OldStyle(torch.autograd.Function):
    """`x**2 * y` with `ctx` in `forward`, so that torch.func refuses it; differentiable twice."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x**2 * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return 2 * x * y * grad, x**2 * grad


class OpaqueWithSetup(torch.autograd.Function):
    """`Opaque` in torch's newer style, which torch.func accepts, giving zeros for second derivatives."""

    @staticmethod
    def forward(x, y):
        return x**2 * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = Opaque.backward


def old_style_jax(x, y):
    return x**2 * y


def attention_torch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def attention_jax(q, k, v):
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / jnp.sqrt(q.shape[-1]), -1)
    return weights @ v


def causal_torch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def causal_jax(q, k, v):
    scores = jnp.where(jnp.tri(q.shape[-2], dtype=bool), q @ k.swapaxes(-1, -2) * 0.3, -jnp.inf)
    return jax.nn.softmax(scores, -1) @ v


def gru_torch(x, w_ih, w_hh, b_ih, b_hh):
    return torch.gru(x, torch.zeros(1, 1, 2), [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, True)[0]


def gru_jax(x, w_ih, w_hh, b_ih, b_hh):
    def step(h, x):
        r_x, z_x, n_x = jnp.split(w_ih @ x + b_ih, 3)
        r_h, z_h, n_h = jnp.split(w_hh @ h + b_hh, 3)
        z = jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
        h = (1 - z) * n + z * h
        return h, h

    return jax.lax.scan(step, jnp.zeros(2), x[0])[1][None]


def lstm_torch(x, w_ih, w_hh, b_ih, b_hh):
    state = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    return torch.lstm(x, state, [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, True)[0]


def lstm_jax(x, w_ih, w_hh, b_ih, b_hh):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return jax.lax.scan(step, (jnp.zeros(2), jnp.zeros(2)), x[0])[1][None]


OPS = {
    "attention": twins.Twin(attention_torch, attention_jax, ((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))),
    "causal attention": twins.Twin(causal_torch, causal_jax, ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
    "GRU": twins.Twin(gru_torch, gru_jax, ((1, 3, 2), (6, 2), (6, 2), (6,), (6,))),
    "LSTM": twins.Twin(lstm_torch, lstm_jax, ((1, 3, 2), (8, 2), (8, 2), (8,), (8,))),
    "autograd.Function": twins.Twin(OldStyle.apply, old_style_jax, ((3,), (3,)), {"vmap_method": "loop"}),
}
OPAQUE = [
    twins.Twin(function.apply, old_style_jax, ((3,), (3,)), {"vmap_method": "loop"})
    for function in (Opaque, OpaqueWithSetup)
]

FIRST = {
    "grad": lambda f, *args: jax.grad(total(f), tuple(range(len(args))))(*args),
    "jvp": lambda f, *args: jax.jvp(f, args, args),
    "jvp of one": lambda f, x, *rest: jax.jvp(lambda x: f(x, *rest), (x,), (x,)),
    "linearize": lambda f, *args: jax.linearize(f, *args)[1](*args),
    "jacfwd": lambda f, *args: jax.jacfwd(f)(*args),
    "jacrev": lambda f, *args: jax.jacrev(f, len(args) - 1)(*args),
}
HIGHER = {
    "hessian": lambda f, *args: jax.hessian(total(f))(*args),
    "reverse over reverse": lambda f, *args: jax.jacrev(jax.jacrev(total(f)), 1)(*args),
    "forward over reverse": lambda f, *args: jax.jvp(jax.grad(total(f), (0, 1)), args, args),
    "reverse over forward": lambda f, *args: jax.grad(lambda *xs: jax.jvp(total(f), xs, args)[1], (0, 1))(*args),
    "forward over forward": lambda f, *args: jax.jvp(lambda *xs: jax.jvp(f, xs, args)[1], args, args),
}


@eager_and_jit
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("transform", FIRST.values(), ids=FIRST)
def test_first_derivatives(transform, op, jit):
    args = op.arguments()
    close(
        jit(lambda *xs: transform(op.ours, *xs))(*args),
        jax.jit(lambda *xs: transform(op.jax, *xs))(*args),
    )


@pytest.mark.long
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("transform", HIGHER.values(), ids=HIGHER)
def test_higher_derivatives(transform, op):
    args = op.arguments()
    close(
        jax.jit(lambda *xs: transform(op.ours, *xs))(*args),
        jax.jit(lambda *xs: transform(op.jax, *xs))(*args),
    )


@eager_and_jit
@pytest.mark.parametrize("op", OPAQUE, ids=["ctx in forward", "setup_context"])
@pytest.mark.parametrize("transform", FIRST.values(), ids=FIRST)
def test_forward_mode_of_a_backward_that_cannot_be_differentiated(transform, op, jit):
    args = op.arguments()
    close(jit(lambda *xs: transform(op.ours, *xs))(*args), transform(op.jax, *args))


@pytest.mark.long
@pytest.mark.parametrize("op", OPAQUE, ids=["ctx in forward", "setup_context"])
@pytest.mark.parametrize("loss", [total, lambda f: lambda *xs: f(*xs).sum()], ids=["curved", "linear"])
@pytest.mark.parametrize(
    "transform", [jax.hessian, lambda f: jax.jacrev(jax.grad(f))], ids=["hessian", "reverse twice"]
)
def test_second_derivative_of_such_a_backward_is_an_error_not_zero(transform, loss, op):
    with pytest.raises(Exception, match="once_differentiable"):
        jax.block_until_ready(transform(loss(op.ours))(*op.arguments()))


@pytest.mark.long
@pytest.mark.parametrize("op", ["attention", "autograd.Function"])
@pytest.mark.parametrize("transform", ["jvp", "hessian", "forward over reverse"])
def test_vmap_of_forward_mode(transform, op):
    """Ops torch.func cannot transform run as a loop, silently when asked to."""
    op, transform = OPS[op], (FIRST | HIGHER)[transform]
    args = op.arguments(lead=(3,))
    ours = torchleaf.torch_function(op.torch, vmap_method="loop")
    close(
        jax.jit(jax.vmap(lambda *xs: transform(ours, *xs)))(*args),
        jax.jit(jax.vmap(lambda *xs: transform(op.jax, *xs)))(*args),
    )


@pytest.mark.long
def test_vmapped_attention_needs_no_loop():
    """The plain kernel has a batching rule; a warning would fail this test."""
    op = OPS["attention"]
    args = op.arguments(lead=(3,))

    def derivatives(f):
        return (jax.vmap(f)(*args), jax.grad(lambda *xs: total(jax.vmap(f))(*xs), (0, 1, 2))(*args))

    close(derivatives(op.ours), derivatives(op.jax))


@pytest.mark.long
@pytest.mark.parametrize("cls", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_modules(cls, monkeypatch):
    """Two layers, both directions: tangents of the weights against torch's own double backward."""
    module = cls(3, 2, num_layers=2, bidirectional=True)
    model = torchleaf.TorchModule(module)
    (x,) = twins.normal((4, 3))

    def loss(params):
        return jnp.square(eqx.tree_at(lambda m: m.params, model, params)(x)[0]).sum()

    tangents = jax.tree.map(jnp.cos, model.params)
    (value, slope), (grads, hvp) = jax.jit(
        lambda ps, ts: (jax.jvp(loss, (ps,), (ts,)), jax.jvp(jax.grad(loss), (ps,), (ts,)))
    )(model.params, tangents)

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # have no double backward
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    names, weights = zip(*module.named_parameters(), strict=True)
    expected = module(torchleaf.to_torch(x))[0].square().sum()
    first = torch.autograd.grad(expected, weights, create_graph=True)
    directional = sum((g * torchleaf.to_torch(tangents[n])).sum() for n, g in zip(names, first, strict=True))
    second = torch.autograd.grad(directional, weights)
    close((value, slope), from_torch((expected, directional)))
    close(grads, from_torch(dict(zip(names, first, strict=True))))
    close(hvp, from_torch(dict(zip(names, second, strict=True))))


@pytest.mark.long
def test_ctc_loss():
    """A loss without double backward in torch, against optax's twin; infinitely long paths excluded."""
    import optax

    logits = twins.normal((8, 2, 5))[0]
    labels, lengths, label_lengths = jnp.array([[1, 2, 2], [3, 4, 0]]), jnp.array([8, 7]), jnp.array([3, 2])

    @torchleaf.torch_function(vmap_method="loop")
    def ours(logits, labels, lengths, label_lengths):
        return F.ctc_loss(logits.log_softmax(-1), labels, lengths, label_lengths, reduction="none")

    def twin(logits, labels, lengths, label_lengths):
        padding = jnp.arange(8)[None] >= lengths[:, None]
        label_padding = jnp.arange(3)[None] >= label_lengths[:, None]
        return optax.ctc_loss(
            logits.swapaxes(0, 1), padding.astype(jnp.float32), labels, label_padding.astype(jnp.float32)
        )

    def derivatives(function):
        def loss(logits):
            return function(logits, labels, lengths, label_lengths)

        return jax.jit(
            lambda x: (
                loss(x),
                jax.grad(lambda x: loss(x).sum())(x),
                jax.jacrev(loss)(x),
                jax.jvp(loss, (x,), (jnp.cos(x),)),
                jax.linearize(loss, x)[1](x),
            )
        )(logits)

    close(derivatives(ours), derivatives(twin))


def _scaled_by_a_constant(x):
    with torch.no_grad():  # torch's stop_gradient
        scale = x.sum()
    return x * scale


def test_no_grad_stops_tangents_as_it_stops_gradients():
    fn, x = torchleaf.torch_function(_scaled_by_a_constant), jnp.array([1.0, 2.0, 3.0])
    expected = x.sum() * jnp.eye(3)
    assert_trees_close(jax.jacrev(fn)(x), expected)
    assert_trees_close(jax.jacfwd(fn)(x), expected)
    assert_trees_close(jax.jit(jax.jacfwd(fn))(x), expected)
    assert_trees_close(jax.vmap(jax.jacfwd(fn))(x[None]), expected[None])
    assert_trees_close(jax.linearize(fn, x)[1](x), x.sum() * x)
