"""Torch code that writes into its arguments never writes into JAX's arrays, and computes what it does in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch, repeated_jit
from samples import as_torch
from torch.nn import functional as F
from torchleaf import TorchCallError, to_jax, torch_function
from untouched import unchanged

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5
SHAPE = jax.ShapeDtypeStruct((2, 3), jnp.float32)

residuals = pytest.mark.parametrize("residuals", ["live", "recompute"])


# --- what writes ---------------------------------------------------------------------------------


def _relu_in_place(x, y):
    return F.relu_(x) + y


def _accumulate(x, y):
    y += x
    return y


def _through_a_view(x, y):
    x[0, :2].mul_(0)
    x.T[1] = 5.0
    return x, y


def _out_argument(x, y):
    with torch.no_grad():  # torch differentiates no op with `out=`
        torch.add(x, 1, out=y)
    return x * y


def _swap(x, y):
    x_before = x.clone()
    x.copy_(y)
    y.copy_(x_before)
    return x, y


def _through_detach(x, y):
    x.detach().add_(1)
    return x * y


def _through_data(x, y):
    x.data.mul_(2)
    return x * y


def _assign_data(x, y):
    x.data = y.detach() * 2
    return x * y


def _through_strides(x, y):
    x.as_strided((3,), (2,)).fill_(0.5)
    return x * y


def _view_of_the_expanded(x, y):
    x.expand(4, 2, 3)[1].add_(1)
    return x * y


def _several_at_once(x, y):
    torch._foreach_mul_([x, y], 2.0)
    return x * y


def _set_to_other_memory(x, y):
    x.set_(y.detach().clone())
    return x.mul_(2) + y


def _resize(x, y):
    x.resize_(3)
    return x.mul_(2) + y


def _swap_objects(x, y):
    torch.utils.swap_tensors(x, y)
    return x.mul_(2) - y


def _depending_on_values(x, y):
    if x.sum() > 0:
        x.add_(1)
    return x * y


def _through_numpy(x, y):
    x.detach().numpy()[...] = 7
    return x * y


class _Dirty(torch.autograd.Function):
    """Doubles in place, as user-defined activations do."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def _autograd_function(x, y):
    return _Dirty.apply(x) * y


@torch.library.custom_op("torchleaf_tests::double_", mutates_args=("x",))
def _double_(x: torch.Tensor) -> None:
    x.mul_(2)


def _custom_op(x, y):
    _double_(x)
    return x * y


INSPECTING = (_depending_on_values, _through_numpy)
DIFFERENTIABLE = (
    _relu_in_place,
    _accumulate,
    _through_a_view,
    _out_argument,
    _swap,
    _through_detach,
    _through_data,
    _through_strides,
    _view_of_the_expanded,
    _several_at_once,
    _autograd_function,
    *INSPECTING,
)
BATCHABLE = (*DIFFERENTIABLE, _custom_op, _assign_data, _set_to_other_memory)
WRITERS = (*BATCHABLE, _resize, _swap_objects)


def name_of(function):
    return function.__name__.strip("_")


def wrap(writer, **options):
    return torch_function(writer, out_shape=SHAPE if writer in INSPECTING else None, **options)


# --- values, derivatives, batches ----------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize("writer", WRITERS, ids=name_of)
def test_writes_into_arguments_stay_inside_the_call(writer, jit):
    inspects = writer in INSPECTING and jit is not repeated_jit  # then the first call itself is the trace
    call = jit(torch_function(writer) if inspects else wrap(writer))
    for sign in (-1, 1):  # the first call is the one that is traced
        x, y = sign * (X + 1), X * 3
        with unchanged(x, y):
            assert_trees_close(call(x, y), from_torch(writer(as_torch(x), as_torch(y))))


@residuals
@eager_and_jit
@pytest.mark.parametrize("writer", DIFFERENTIABLE, ids=name_of)
def test_derivatives_of_writes(writer, jit, residuals, engine):
    if engine == "xla" and writer is _depending_on_values:
        pytest.skip("it reads values")
    fn = wrap(writer, residuals=residuals)
    x, y, dx, dy = X + 1, X * 3, jnp.cos(X), jnp.sin(X)
    inputs = [as_torch(x).requires_grad_(), as_torch(y).requires_grad_()]
    outs = jax.tree.leaves(writer(*(v.clone() for v in inputs)))
    cotangents = [jnp.sin(1 + i + X) for i in range(len(outs))]
    expected = from_torch(torch.autograd.grad(outs, inputs, [as_torch(ct) for ct in cotangents]))

    def pull(x, y, cts):
        out, pullback = jax.vjp(fn, x, y)
        return pullback(jax.tree.unflatten(jax.tree.structure(out), cts))

    with unchanged(x, y, dx, dy, *cotangents):
        assert_trees_close(jit(pull)(x, y, cotangents), expected)


@eager_and_jit
@pytest.mark.parametrize("writer", DIFFERENTIABLE, ids=name_of)
def test_forward_mode_through_writes(writer, jit):
    """It is the transpose of reverse mode, also where a write is hidden from autograd."""
    fn = wrap(writer)
    x, y, dx, dy = X + 1, X * 3, jnp.cos(X), jnp.sin(X)
    with unchanged(x, y, dx, dy):
        out, tangents = jit(lambda *args: jax.jvp(fn, args[:2], args[2:]))(x, y, dx, dy)
    cotangents = jax.tree.map(jnp.cos, out)
    grads = jax.vjp(fn, x, y)[1](cotangents)
    assert_trees_close(dot(tangents, cotangents), dot(grads, (dx, dy)), rtol=1e-4, atol=1e-5)


def dot(a, b):
    return sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0), (1, None)], ids=str)
@pytest.mark.parametrize("writer", BATCHABLE, ids=name_of)
def test_batches_of_writes(writer, in_axes):
    """An operand that all examples share is written to by each on its own."""

    def batch(value, axis):
        return value if axis is None else jnp.stack([value, value - 1, value * 2], axis)

    def example(value, axis, i):
        return as_torch(value if axis is None else jnp.take(value, i, axis))

    x, y = batch(X + 1, in_axes[0]), batch(X * 3, in_axes[1])
    rows = [writer(example(x, in_axes[0], i), example(y, in_axes[1], i)) for i in range(3)]
    with unchanged(x, y):
        actual = jax.jit(jax.vmap(wrap(writer), in_axes))(x, y)
    assert_trees_close(actual, from_torch(jax.tree.map(lambda *ts: torch.stack(ts), *rows)))


def test_a_natively_batched_call_writes_into_the_whole_batch():
    def in_place(x, w):
        w += 1
        x *= w
        return x

    xs, w = jnp.stack([X, X + 1]), X[0]
    with unchanged(xs, w):
        actual = jax.vmap(torch_function(in_place, vmap_method="batched"), (0, None))(xs, w)
    assert_trees_close(actual, xs * (w + 1))


# --- where arguments come from -------------------------------------------------------------------


def test_writes_do_not_reach_a_view_of_torch_memory():
    tensor = torch.arange(16.0)
    got = torch_function(lambda x: x.mul_(2))(to_jax(tensor))
    assert_trees_close(got, 2 * jnp.arange(16.0))
    assert torch.equal(tensor, torch.arange(16.0))


@eager_and_jit
def test_one_array_given_twice_is_two_arguments(jit):
    with unchanged(X):
        x, y = jit(torch_function(lambda x, y: (x.add_(1), y)))(X, X)
    assert_trees_close((x, y), (X + 1, X))


@eager_and_jit
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64], ids=lambda d: d.__name__)
def test_numpy_arguments(jit, dtype):
    """JAX may view NumPy's memory; 16 rows make it large enough and aligned for that."""
    x = np.arange(64, dtype=dtype).reshape(16, 4)
    with unchanged(x):
        y = jit(torch_function(lambda x: x.mul_(2)))(x)
        jax.block_until_ready(y)
    assert_trees_close(np.asarray(y, dtype), 2 * x)


def test_donated_arguments():
    """The donated array is gone, as always; one that is not donated stays."""

    def in_place(x, y):
        x += y
        y.zero_()
        return x

    step = jax.jit(torch_function(in_place), donate_argnums=0)
    x, y = X + 0, X * 3
    with unchanged(y):
        for n in range(1, 4):
            x = step(x, y)
            assert_trees_close(x, X + n * y)


@eager_and_jit
def test_closed_over_arrays(jit):
    y = X * 3
    with unchanged(X, y):
        assert_trees_close(jit(lambda x: torch_function(_accumulate)(x, y))(X), X + y)


def test_a_loop_carries_what_is_written():
    def accumulate(total, x):
        total += x
        return total, total

    start, xs = jnp.zeros(3), jnp.arange(12.0).reshape(4, 3)
    with unchanged(start, xs):
        total, sums = jax.lax.scan(torch_function(accumulate), start, xs)
    assert_trees_close((total, sums), (xs.sum(0), jnp.cumsum(xs, 0)))


# --- derivatives of writes, and writes by derivatives --------------------------------------------


def test_gradient_through_a_write():
    def in_place(x):
        y = x * 1
        y[0] = 0
        return y.mul_(2).sin().sum()

    def pure(x):
        return jnp.sin(2 * x.at[0].set(0)).sum()

    assert_trees_close(jax.grad(torch_function(in_place))(X), jax.grad(pure)(X))
    argument = torch_function(lambda x: x.exp_().sum())
    assert_trees_close(jax.grad(argument)(X), jnp.exp(X))


@residuals
@eager_and_jit
def test_a_write_where_gradients_are_enabled(jit, residuals):
    """As they are by default in torch, in a call without derivatives too."""

    def in_place(x, w):
        if torch.is_grad_enabled():
            w.mul_(3)
        return (x * w).sum()

    fn, x, w = torch_function(in_place, residuals=residuals), X + 1, X * 2
    with unchanged(x, w):
        assert_trees_close(jit(fn)(x, w), 3 * (x * w).sum())
        assert_trees_close(jit(jax.value_and_grad(fn))(x, w), (3 * (x * w).sum(), 3 * w))


@pytest.mark.torch_engine  # XLA computes one function, differentiated or not
@residuals
@eager_and_jit
@pytest.mark.parametrize("written", [0, 1], ids=["differentiated", "other"])
def test_a_write_where_gradients_are_recorded(written, jit, residuals):
    """Such a function is another one where it is differentiated."""

    def in_place(*arguments):
        if arguments[0].requires_grad:
            arguments[written].mul_(3)
        return (arguments[0] * arguments[1]).sum()

    fn, x, w = torch_function(in_place, residuals=residuals), X + 1, X * 2
    with unchanged(x, w):
        assert_trees_close(jit(fn)(x, w), (x * w).sum())
        with pytest.raises(TorchCallError, match=r"in_place writes into an argument only where .* requires gradients"):
            jit(jax.grad(fn))(x, w)


class _WritesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.mul_(x.mul_(2))


def _clips_gradients(x):
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp_(-0.1, 0.1))
    return x.view_as(x)


@residuals
@eager_and_jit
@pytest.mark.parametrize(
    ("function", "expected"),
    [(_WritesInBackward.apply, 2 * X * jnp.cos(X)), (_clips_gradients, jnp.clip(jnp.cos(X), -0.1, 0.1))],
    ids=["autograd-function", "hook"],
)
def test_a_write_in_the_backward_pass(function, expected, jit, residuals, engine):
    """Into what the forward saved, and into the cotangent."""
    if engine == "xla" and function is _clips_gradients:
        pytest.skip("hooks are refused")
    fn = torch_function(function, residuals=residuals)
    x, ct = X + 0, jnp.cos(X)
    with unchanged(x, ct):
        (grad,) = jit(lambda x, ct: jax.vjp(fn, x)[1](ct))(x, ct)
    assert_trees_close(grad, expected)


# --- what cannot work ----------------------------------------------------------------------------


@pytest.mark.torch_engine  # of memory
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@eager_and_jit
@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (lambda x: x.expand(4, 2, 3).add_(1), "more than one element of the written-to tensor"),
        (lambda x: x.untyped_storage().fill_(0) and x + 1, "argument x"),
        (lambda x: torch.from_dlpack(x).fill_(0), "not an argument but captured"),
    ],
    ids=["expanded", "storage", "dlpack"],
)
def test_writes_that_fail(writer, message, jit):
    x = X + 0
    with unchanged(x), pytest.raises(Exception, match=message):
        jax.block_until_ready(jit(torch_function(writer))(x))
