"""Functions that read values: under every transformation, without being told their shapes, and equal to torch's."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from samples import as_torch
from torch import distributions as D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import TorchCallError, torch_function

RUNS = 5
pytestmark = pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- what reads values ---------------------------------------------------------------------------


def checked(x):
    assert not x.isnan().any()
    return x.sin()


def early_exit(x):
    if x.norm() > 2:
        return x / x.norm()
    return x * 2


def scaled(x):
    return x * x.abs().max().item()


def listed(x):
    return x + max(x.flatten().tolist())


def indexed_by_an_integer(x):
    return x[x[:, 0].argmax()] * 2


def looped(x):
    while x.abs().max() > 0.5:
        x = x * 0.7
    return x


def masked_loss(x):
    mask = x > 0
    return (x[mask] ** 2).mean() + (x[~mask] ** 2).sum()


def counted(x):
    return x * len(torch.unique(x > 0))


def kept_rows(x):
    rows = torch.nonzero(x[:, 0] > 0)[:, 0]
    return x.index_select(0, rows).sum(0)


def swapped(x):
    try:
        positive = bool((x > 0).all())
    except RuntimeError:  # some code looks whether it is traced
        positive = True
    return x.exp() if positive else x.cos()


def lu_of_a_matrix(x):
    a = x.mT @ x + torch.eye(x.shape[1])
    if torch.linalg.det(a) < 0.1:
        return a
    return torch.linalg.cholesky(a)


def script(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


@script
def scripted(x):
    if torch.all(x > 0):
        return x.sqrt()
    return x * 3


@script
def scripted_loop(x):
    n = 0
    while bool((x.abs() > 0.5).any()) and n < 10:
        x = x * 0.8
        n += 1
    return x + n


def normal_log_prob(x):
    return D.Normal(x, x.abs() + 0.1).log_prob(x * 2)


def beta_log_prob(x):
    return D.Beta(x.abs() + 0.5, x.abs() + 1).log_prob(torch.sigmoid(x))


def categorical_entropy(x):
    return D.Categorical(logits=x).entropy()


def dirichlet_log_prob(x):
    return D.Dirichlet(x.abs() + 1).log_prob(torch.softmax(x, -1))


def multivariate_log_prob(x):
    covariance = x.mT @ x + torch.eye(x.shape[1])
    return D.MultivariateNormal(x.mean(0), covariance).log_prob(x)


def divergence(x):
    return D.kl_divergence(D.Normal(x, x.abs() + 1), D.Normal(x * 0, x.abs() + 2))


def transformed(x):
    base = D.Normal(torch.zeros_like(x), torch.ones_like(x))
    return D.TransformedDistribution(base, [D.transforms.AffineTransform(1.0, 2.0)]).log_prob(x)


def gaussian_nll(x):
    return nn.functional.gaussian_nll_loss(x, x * 0.5, x.abs() + 0.1)


@torch.library.custom_op("torchleaf_tests::square_without_shapes", mutates_args=())
def square_without_shapes(x: torch.Tensor) -> torch.Tensor:
    return x * x


square_without_shapes.register_autograd(
    lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("torchleaf_tests::picky_shapes", mutates_args=())
def picky_shapes(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@picky_shapes.register_fake
def _(x):
    """Stricter than the kernel, as the one of grouped matrix products is."""
    torch._check(x.dtype == torch.bfloat16, lambda: "Expected a tensor of bfloat16")
    return torch.empty_like(x)


picky_shapes.register_autograd(lambda ctx, grad: 3 * grad)


READERS = {
    f.__name__: f
    for f in (
        *(checked, early_exit, scaled, listed, indexed_by_an_integer, looped, masked_loss, counted, kept_rows),
        *(swapped, lu_of_a_matrix),
        *(normal_log_prob, beta_log_prob, categorical_entropy, dirichlet_log_prob, multivariate_log_prob),
        *(divergence, transformed, gaussian_nll),
    )
} | {
    "scripted": lambda x: scripted(x),
    "scripted_loop": lambda x: scripted_loop(x),
    "op without shapes": lambda x: square_without_shapes(x).sin(),
    "op with picky shapes": lambda x: picky_shapes(x),
}
readers = pytest.mark.parametrize("name", READERS)


def inputs(run):
    return normal(4, 3, seed=run) * (1 + run) / 2 + (2 if run % 2 else 0)


def gradient(function, x):
    leaf = as_torch(x).requires_grad_()
    (function(leaf) ** 2).sum().backward()
    return from_torch(leaf.grad)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- transformations -----------------------------------------------------------------------------


@readers
def test_compiled_without_a_call_outside(name):
    function = READERS[name]
    program = jax.jit(torch_function(function))
    for run in range(RUNS):
        close(program(inputs(run)), from_torch(function(as_torch(inputs(run)))))


@readers
def test_gradients_without_a_call_outside(name):
    function = READERS[name]
    wrapped = torch_function(function)
    step = jax.grad(lambda x: (wrapped(x) ** 2).sum())
    compiled = jax.jit(step)
    for run in range(RUNS):
        expected = gradient(function, inputs(run))
        close(step(inputs(run)), expected)
        close(compiled(inputs(run)), expected)


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("name", ["early_exit", "scripted", "normal_log_prob"])
def test_forward_mode_and_second_derivatives(name, residuals):
    function = READERS[name]
    wrapped = torch_function(function, residuals=residuals)

    def loss(x):
        return (wrapped(x) ** 2).sum()

    x, tangent = inputs(1), normal(4, 3, seed=9)
    close(jax.jvp(loss, (x,), (tangent,))[1], (gradient(function, x) * tangent).sum())
    leaf = as_torch(x).requires_grad_()
    (first,) = torch.autograd.grad((function(leaf) ** 2).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * as_torch(tangent)).sum(), leaf)
    close(jax.jvp(jax.grad(loss), (x,), (tangent,))[1], from_torch(expected))


@readers
def test_batches_without_a_call_outside(name):
    function = READERS[name]
    xs = jnp.stack([inputs(run) for run in range(3)])
    expected = [from_torch(function(as_torch(x))) for x in xs]
    close(jax.vmap(torch_function(function))(xs), jnp.stack(expected))
    close(jax.jit(jax.vmap(torch_function(function)))(xs), jnp.stack(expected))
    grads = jax.vmap(jax.grad(lambda x: (torch_function(function)(x) ** 2).sum()))(xs)
    close(grads, jnp.stack([gradient(function, x) for x in xs]))


@pytest.mark.parametrize(
    "name", ["checked", "early_exit", "looped", "scripted_loop", "divergence", "op without shapes"]
)
def test_loops_without_a_call_outside(name):
    """A scan that carries what the function returns."""
    function, wrapped = READERS[name], torch_function(READERS[name])
    x = inputs(1) / 3
    carried, _ = jax.lax.scan(lambda x, _: (wrapped(x), None), x, None, 3)
    expected = as_torch(x)
    for _ in range(3):
        expected = function(expected)
    close(carried, from_torch(expected))


def test_values_of_other_dtypes():
    def choose(x, n, flag):
        y = x * int(n) if bool(flag) else x - int(n)
        return y.double().sum().item() * x

    program = jax.jit(torch_function(choose))
    for run in range(RUNS):
        x, n, flag = inputs(run), jnp.int32(run), jnp.array(run % 2 == 0)
        close(program(x, n, flag), from_torch(choose(as_torch(x), torch.tensor(run), torch.tensor(run % 2 == 0))))


# --- leaving torch -------------------------------------------------------------------------------


def by_numpy(x):
    return torch.from_numpy(np.cumsum(x.detach().numpy(), axis=0)) * x


def by_numpy_depending_on_values(x):
    return x * 2 if np.linalg.norm(x.detach().numpy()) > 2 else x + 1


def by_tolist_and_back(x):
    return torch.tensor(x.tolist()) * x


@pytest.mark.parametrize("function", [by_numpy, by_numpy_depending_on_values, by_tolist_and_back])
def test_functions_that_leave_torch(function):
    wrapped = torch_function(function)
    program, step = jax.jit(wrapped), jax.jit(jax.grad(lambda x: (wrapped(x) ** 2).sum()))
    for run in range(RUNS):
        x = inputs(run)
        close(program(x), from_torch(function(as_torch(x))))
        close(step(x), gradient(function, x))
    close(jax.vmap(wrapped)(inputs(1)[None])[0], from_torch(function(as_torch(inputs(1)))))


# --- torch decides whether a call fails ------------------------------------------------------------


def test_what_real_tensors_refuse_is_refused_with_torchs_words():
    def mismatch(x):
        return x @ x if x.sum() > 0 else x @ x.exp()

    for transform in (lambda f: f, jax.jit, jax.vmap):
        x = normal(2, 4, 3) if transform is jax.vmap else normal(4, 3)
        with pytest.raises(
            TorchCallError, match=r"(?s).*mismatch failed on operands \(x: .*torch said: RuntimeError: .*mat1 and"
        ):
            transform(torch_function(mismatch))(x)


def test_what_only_some_values_refuse_is_not():
    """Synthetic values need not be ones that the function accepts; those of the call decide."""

    def picky(x):
        if not bool((x > 1).all()):
            raise ValueError("only above one")
        return x.log()

    with pytest.raises(TorchCallError, match=r"(?s)picky failed on operands.*ValueError: only above one"):
        jax.jit(torch_function(picky))(inputs(0))
    given = jnp.full((4, 3), 2.0)
    program = jax.jit(torch_function(picky, example_args=(given,)))
    close(program(given), jnp.log(given))
    with pytest.raises(Exception, match="only above one"):
        jax.block_until_ready(program(given - 5))
    eager = torch_function(picky)
    close(eager(given), jnp.log(given))
    close(jax.jit(eager)(given), jnp.log(given))


def test_what_some_synthetic_values_accept_is_called():
    def positive(x):
        if bool((x <= 0).any()):
            raise ValueError("only positive")
        return x.log()

    def triangular(x):
        return torch.linalg.cholesky(x) if x.sum() > 0 else x

    def ordered(x, times):
        assert (times[1:] > times[:-1]).all(), "times must be in order"
        return x * times.diff().sum()

    program = jax.jit(torch_function(positive))
    x = jnp.full((4, 3), 2.0)
    close(program(x), jnp.log(x))
    with pytest.raises(Exception, match="only positive"):
        jax.block_until_ready(program(-x))
    matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    close(jax.jit(torch_function(triangular))(matrix), jnp.linalg.cholesky(matrix))
    close(jax.jit(torch_function(ordered))(x, jnp.array([0.0, 0.5, 3.0])), 3 * x)


def test_shapes_that_rarely_depend_on_values_are_checked_in_every_run():
    """Only values below minus ten make another shape, which no example shows."""

    def rarely(x):
        return x[:1] if x.min() < -10 else x

    program = jax.jit(torch_function(rarely))
    close(program(inputs(0)), inputs(0))
    with pytest.raises(Exception, match=r"rarely: output 0 has shape \(1, 3\) at run time, but \(4, 3\).*padded"):
        jax.block_until_ready(program(inputs(0) - 100))


def test_static_outputs_that_depend_on_values():
    def measured(x):
        return x, float(x.sum())

    with pytest.raises(TorchCallError, match=r"(?s)measured .*reads values.*out_shape"):
        jax.jit(lambda x: torch_function(measured)(x)[0])(inputs(0))


# --- what the trace costs --------------------------------------------------------------------------


def test_two_examples_are_enough():
    seen = []

    def function(x):
        seen.append(type(x))
        return x * x.sum().item()

    jax.jit(torch_function(function)).lower(inputs(0))
    assert sum(not issubclass(kind, FakeTensor) for kind in seen) == 2
    seen.clear()
    torch_function(function)(inputs(0))
    assert sum(not issubclass(kind, FakeTensor) for kind in seen) == 2  # on its arguments, and the run


def test_no_generator_moves_for_examples():
    def function(x):
        return x * x.sum().item()

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    jax.jit(torch_function(function))(inputs(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# --- modules -------------------------------------------------------------------------------------


class Checked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        if x.isnan().any() or not (self.norm.running_var > 0).all():
            raise ValueError("no numbers")
        return self.norm(self.linear(x)) * float(self.linear.weight.detach().abs().max())


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_modules_whose_weights_are_traced(residuals):
    module = Checked().eval()
    model = torchleaf.TorchModule(module, residuals=residuals)
    call = eqx.filter_jit(lambda model, x: model(x))
    step = eqx.filter_jit(eqx.filter_grad(lambda model, x: (model(x) ** 2).sum()))
    for run in range(RUNS):
        x = inputs(run)
        close(call(model, x), from_torch(module(as_torch(x))))
        module.zero_grad()
        (module(as_torch(x)) ** 2).sum().backward()
        expected = {name: from_torch(p.grad) for name, p in module.named_parameters()}
        close(step(model, x).params, expected)
    close(jax.vmap(model)(inputs(1)[None])[0], from_torch(module(as_torch(inputs(1)))))


def test_double_precision_in_a_program_that_runs_elsewhere():
    """On a thread that knows nothing of the `enable_x64` under which it was traced, as XLA's own."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.linspace(0.1, 2, 3))
        program = jax.jit(torch_function(early_exit)).lower(x).compile()
    assert program(x).dtype == np.float64
    np.testing.assert_allclose(program(x), early_exit(torch.from_numpy(np.array(x))).numpy(), rtol=1e-12)
