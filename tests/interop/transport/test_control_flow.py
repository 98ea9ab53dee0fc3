"""Torch functions inside JAX's control flow, rematerialisation, custom derivatives and ahead-of-time compilation."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from watching import Recorder

pytestmark = pytest.mark.both_engines(every=4)


def step_torch(h, w):
    return torch.tanh(h @ w) + 0.1 * h


def step_jax(h, w):
    return jnp.tanh(h @ w) + 0.1 * h


@pytest.fixture(params=["live", "recompute"])
def step(request):
    """`(3,), (3, 3) -> (3,)` in torch, with both ways of keeping what the backward pass needs."""
    return torchleaf.torch_function(step_torch, residuals=request.param)


@pytest.fixture
def args():
    return twins.normal((3,), (3, 3))


def assert_same(transform, ours, twin, *args, jit=jax.jit, rtol=2e-4):
    actual = jit(lambda *xs: transform(ours, *xs))(*args)
    assert_trees_close(actual, jax.jit(lambda *xs: transform(twin, *xs))(*args), rtol=rtol, atol=1e-5)


# --- control flow ------------------------------------------------------------------------------------


def scan(f, h, w):
    def body(h, t):
        new = f(h, w) + t
        return new, jnp.sum(new)

    return lax.scan(body, h, jnp.arange(4.0))


def scan_of_grad(f, h, w):
    """Gradient descent, each step a gradient through torch."""

    def body(w, _):
        value, grad = jax.value_and_grad(lambda w: jnp.square(f(h, w)).sum())(w)
        return w - 0.1 * grad, value

    return lax.scan(body, w, length=3)


def nested_scan(f, h, w):
    def outer(h, _):
        return lax.scan(lambda h, _: (f(h, w), None), h, length=2)[0], h

    return lax.scan(outer, h, length=2)


def while_loop(f, h, w):
    return lax.while_loop(lambda s: (s[1] < 5) & (jnp.abs(s[0]).max() < 9), lambda s: (f(s[0], w), s[1] + 1), (h, 0))


def fori_loop(f, h, w):
    return lax.fori_loop(0, 3, lambda i, h: f(h, w) * (i + 1), h)


def cond(f, h, w):
    return [lax.cond(p, lambda h: f(h, w), lambda h: h * 2, h) for p in (h[0] > 0.5, h[0] < 0.5)]


def switch(f, h, w):
    branches = [lambda h: f(h, w), jnp.sin, lambda h: f(f(h, w), w.T)]
    return [lax.switch(jnp.asarray(i), branches, h) for i in range(3)]


def select_inside_scan(f, h, w):
    def body(h, i):
        return lax.cond(i % 2 == 0, lambda h: f(h, w), lambda h: h.at[0].add(1.0), h), h

    return lax.scan(body, h, jnp.arange(4))


def mapped(f, h, w):
    return lax.map(lambda x: f(x, w), jnp.stack([h, 2 * h, 3 * h]))


def mapped_in_batches(f, h, w):
    return lax.map(lambda x: f(x, w), jnp.stack([h, 2 * h, 3 * h]), batch_size=2)


def associative(f, h, w):
    return lax.associative_scan(jax.vmap(lambda a, b: f(a, w) + b), jnp.stack([h, h + 1, h - 1]))


FORWARD_ONLY = {"while_loop": while_loop}
LOOPS = {
    "scan": scan,
    "scan of grad": scan_of_grad,
    "nested scan": nested_scan,
    "fori_loop": fori_loop,
    "cond": cond,
    "switch": switch,
    "cond in scan": select_inside_scan,
    "map": mapped,
    "map in batches": mapped_in_batches,
    "associative_scan": associative,
}


def total(loop, f):
    return lambda *xs: sum(jnp.sin(y).sum() for y in jax.tree.leaves(loop(f, *xs)))


@eager_and_jit
@pytest.mark.parametrize("loop", (FORWARD_ONLY | LOOPS).values(), ids=FORWARD_ONLY | LOOPS)
def test_values(loop, args, jit):
    assert_same(loop, torchleaf.torch_function(step_torch), step_jax, *args, jit=jit)


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_reverse_mode(loop, step, args):
    assert_same(lambda f, *xs: jax.value_and_grad(total(loop, f), (0, 1))(*xs), step, step_jax, *args)


@pytest.mark.parametrize("loop", (FORWARD_ONLY | LOOPS).values(), ids=FORWARD_ONLY | LOOPS)
def test_forward_mode(loop, args):
    def transform(f, *xs):
        return jax.jvp(lambda *xs: jax.tree.leaves(loop(f, *xs))[0], xs, xs)

    assert_same(transform, torchleaf.torch_function(step_torch), step_jax, *args)


@pytest.mark.parametrize("loop", [scan, cond, switch, select_inside_scan, while_loop])
def test_vmap(loop, args):
    """A batched predicate turns cond and switch into a select of both branches."""
    h, w = args
    batch = jnp.stack([h, h + 1, -h])

    def transform(f, h, w):
        return jax.vmap(lambda h: loop(f, h, w))(h)

    assert_same(transform, torchleaf.torch_function(step_torch), step_jax, batch, w)


@pytest.mark.parametrize("loop", [scan, cond, switch])
def test_grad_of_vmap(loop, step, args):
    h, w = args
    batch = jnp.stack([h, h + 1, -h])

    def transform(f, h, w):
        return jax.grad(lambda h, w: jax.vmap(lambda h: total(loop, f)(h, w))(h).sum(), (0, 1))(h, w)

    assert_same(transform, step, step_jax, batch, w)


@pytest.mark.long
def test_second_order_through_scan(step, args):
    def transform(f, h, w):
        return (
            jax.hessian(total(scan, f))(h, w),
            jax.grad(lambda w: jnp.square(jax.grad(total(scan, f), 1)(h, w)).sum())(w),
        )

    assert_same(transform, step, step_jax, *args)


def test_scan_over_stacked_weights(step, args):
    """Layers as a scan: each iteration has its own weights and its own gradient of them."""
    h, w = args
    layers = jnp.stack([w, w.T, -w])

    def transform(f, h, ws):
        return jax.grad(lambda ws: lax.scan(lambda h, w: (f(h, w), None), h, ws)[0].sum())(ws)

    assert_same(transform, step, step_jax, h, layers)


def test_implicit_gradient_through_a_linear_solve(args):
    """`custom_linear_solve` transposes the torch matvec it is given the transpose of."""
    h, w = args
    a = w @ w.T + 3 * jnp.eye(3)

    def solve(f, a, b):
        def iterate(matvec, b):
            return lax.fori_loop(0, 200, lambda _, x: x + 0.05 * (b - matvec(x)), jnp.zeros_like(b))

        return lax.custom_linear_solve(lambda x: f(a, x), b, solve=iterate, symmetric=True)

    ours, twin = torchleaf.torch_function(torch.mv), jnp.dot

    def linear(f):
        return lambda a, x: jax.linearize(lambda x: f(a, x), jnp.zeros_like(x))[1](x)

    def transform(f, a, b):
        return jax.grad(lambda a, b: jnp.sin(solve(linear(f), a, b)).sum(), (0, 1))(a, b)

    assert_same(transform, ours, twin, a, h)


# --- rematerialisation -------------------------------------------------------------------------------

POLICIES = {
    "nothing": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("h"),
}


@pytest.mark.usefixtures("each_remat")
@eager_and_jit
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_checkpoint(policy, step, args, jit):
    def loss(f, h, w):
        def block(h, w):
            return checkpoint_name(f(f(h, w), w), "h")

        return jnp.sin(jax.checkpoint(block, policy=policy)(h, w)).sum()

    assert_same(
        lambda f, *xs: jax.value_and_grad(lambda *xs: loss(f, *xs), (0, 1))(*xs), step, step_jax, *args, jit=jit
    )


@pytest.mark.torch_engine  # torch's ops are watched
@pytest.mark.parametrize("policy", [None, "everything_saveable"])
def test_checkpoint_recomputes_what_it_does_in_jax(policy, args, each_remat):
    """The forward runs twice where nothing may be saved, once where everything may (with what torch keeps of it)."""
    policy = policy and getattr(jax.checkpoint_policies, policy)

    def gradient(step):
        block = jax.checkpoint(step, policy=policy)
        return jax.jit(jax.grad(lambda h, w: jnp.sin(block(h, w)).sum()))

    recorder = Recorder(step_torch)
    jax.block_until_ready(gradient(torchleaf.torch_function(recorder))(*args))
    assert len(recorder.computed) == str(jax.make_jaxpr(gradient(step_jax))(*args)).count("= tanh ")
    if each_remat == "remat":
        assert len(recorder.computed) == (2 if policy is None else 1)


@pytest.mark.usefixtures("each_remat")
def test_checkpointed_scan(step, args):
    def loss(f, h, w):
        body = jax.checkpoint(lambda h, _: (f(h, w), None))
        return lax.scan(body, h, length=4)[0].sum()

    assert_same(lambda f, *xs: jax.grad(lambda *xs: loss(f, *xs), (0, 1))(*xs), step, step_jax, *args)


@pytest.mark.long
def test_pullback_may_be_used_again(step, args):
    def transform(f, h, w):
        _, pull = jax.vjp(f, h, w)
        return pull(h), pull(2 * h), jax.vmap(pull)(jnp.stack([h, -h]))

    assert_same(transform, step, step_jax, *args, jit=lambda f: f)
    assert_same(transform, step, step_jax, *args)
