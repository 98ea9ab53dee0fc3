"""Second and third derivatives of the ops whose rules torch.func or torch.autograd has wrong.

The four second derivatives agree with a JAX twin, or with finite differences of the gradient in float64.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit
from torch.nn import functional as F

pytestmark = [pytest.mark.both_engines(every=4), pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")]


def close(actual, expected, rtol=1e-3):
    assert_trees_close(actual, expected, rtol=rtol, atol=1e-4)


def total(f):
    """A number that depends on all outputs, and on each differently."""
    return lambda *xs: sum(
        jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype) * y) for y in jax.tree.leaves(f(*xs))
    )


def along(x):
    return jnp.sin(3 * x + 1)


SECOND = {
    "forward over reverse": lambda f, x: jnp.vdot(along(x), jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1]),
    "reverse over reverse": lambda f, x: jnp.vdot(
        jnp.cos(x), jax.grad(lambda x: jnp.vdot(jax.lax.stop_gradient(along(x)), jax.grad(f)(x)))(x)
    ),
    "reverse over forward": lambda f, x: jnp.vdot(
        jnp.cos(x), jax.grad(lambda x: jax.jvp(f, (x,), (jax.lax.stop_gradient(along(x)),))[1])(x)
    ),
    "forward over forward": lambda f, x: jax.jvp(
        lambda x: jax.jvp(f, (x,), (jax.lax.stop_gradient(along(x)),))[1], (x,), (jnp.cos(x),)
    )[1],
}
HIGHER = SECOND | {
    "hessian": lambda f, x: jax.hessian(f)(x),
    "reverse twice": lambda f, x: jax.jacrev(jax.jacrev(f))(x),
    "vmap of hessian": lambda f, x: jax.vmap(jax.hessian(f))(jnp.stack([x, x + 0.1 * jnp.cos(x), x])),
    "vmap of reverse over reverse": lambda f, x: jax.vmap(lambda x: SECOND["reverse over reverse"](f, x))(
        jnp.stack([x, x + 0.1 * jnp.cos(x)])
    ),
    "hessian of vmap": lambda f, x: jax.hessian(lambda xs: jax.vmap(f)(xs).sum())(jnp.stack([x, x + 0.1 * jnp.cos(x)])),
}


def every(transforms, f):
    """All transforms of a function at once: one program to compile."""
    return lambda x: {name: transform(total(f), x) for name, transform in transforms.items()}


# --- linear algebra ----------------------------------------------------------------------------------------------

MATRIX = jnp.array([[2.0, 0.3, 0.1], [0.2, 1.5, 0.4], [0.7, 0.1, 1.1]])
ONES, ROWS = jnp.ones(3), jnp.arange(6.0).reshape(3, 2)
_ONES, _ROWS = torch.ones(3), torch.arange(6.0).reshape(3, 2)


def positive(m):
    return m @ m.T + 2 * (torch.eye(3) if isinstance(m, torch.Tensor) else jnp.eye(3))


LINEAR_ALGEBRA = {
    "det": (torch.linalg.det, jnp.linalg.det),
    "logdet": (lambda a: torch.logdet(positive(a)), lambda a: jnp.linalg.slogdet(positive(a))[1]),
    "slogdet": (lambda a: torch.linalg.slogdet(a)[1], lambda a: jnp.linalg.slogdet(a)[1]),
    "solve": (lambda a: torch.linalg.solve(a, _ONES), lambda a: jnp.linalg.solve(a, ONES)),
    "solve_ex": (lambda a: torch.linalg.solve_ex(a, _ROWS)[0], lambda a: jnp.linalg.solve(a, ROWS)),
    "solve_triangular": (
        lambda a: torch.linalg.solve_triangular(a, _ROWS, upper=True),
        lambda a: jax.scipy.linalg.solve_triangular(a, ROWS),
    ),
    "triangular_solve": (
        lambda a: torch.triangular_solve(_ROWS, a)[0],
        lambda a: jax.scipy.linalg.solve_triangular(a, ROWS),
    ),
    "tensorsolve": (
        lambda a: torch.linalg.tensorsolve(a.reshape(3, 1, 3), _ONES.reshape(3, 1)),
        lambda a: jnp.linalg.solve(a, ONES),
    ),
    "inv": (torch.linalg.inv, jnp.linalg.inv),
    "cholesky_solve": (
        lambda a: torch.cholesky_solve(_ROWS, torch.linalg.cholesky(positive(a))),
        lambda a: jnp.linalg.solve(positive(a), ROWS),
    ),
    "cholesky_inverse": (
        lambda a: torch.cholesky_inverse(torch.linalg.cholesky(positive(a))),
        lambda a: jnp.linalg.inv(positive(a)),
    ),
    "lu_solve": (
        lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), _ROWS),
        lambda a: jnp.linalg.solve(a, ROWS),
    ),
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("op", LINEAR_ALGEBRA.values(), ids=LINEAR_ALGEBRA)
def test_linear_algebra(op, jit):
    ours, twin = op
    actual = jit(every(HIGHER, torchleaf.torch_function(ours)))(MATRIX)
    close(actual, jax.jit(every(HIGHER, twin))(MATRIX))


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ["det", "slogdet", "solve", "inv"])
def test_jacobians_of_a_batch(name, transform, jit):
    ours, twin = LINEAR_ALGEBRA[name]
    batch = MATRIX + jax.random.normal(jax.random.key(0), (5, 3, 3)) / 4
    close(jit(jax.vmap(transform(torchleaf.torch_function(ours))))(batch), jax.vmap(transform(twin))(batch))


@pytest.mark.long
@eager_and_jit
def test_the_determinant_of_the_identity_has_second_derivatives(jit):
    """Where all singular values are one; the batched rule has NaN there."""
    det = torchleaf.torch_function(torch.linalg.det)
    twice = jit(jax.jacrev(jax.jacrev(det)))
    close(twice(jnp.eye(3)), jax.jacrev(jax.jacrev(jnp.linalg.det))(jnp.eye(3)))


# --- norms -------------------------------------------------------------------------------------------------------

X = jnp.array([[[1.0, 2.0, -1.0, 0.5], [0.3, -0.2, 0.9, 1.7], [-0.4, 0.8, 0.1, -1.2]]] * 2) + jnp.array(
    [[[0.0]], [[0.7]]]
) * jnp.sin(jnp.arange(12.0)).reshape(3, 4)
WEIGHT, BIAS = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 0.2, -0.3])


def standardised(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5)


def of_channels(t):
    return jnp.asarray(t.numpy())[:, None]


NORMS = {
    "layer norm": (lambda x: F.layer_norm(x, (4,)), lambda x: standardised(x, (2,))),
    "layer norm of two axes, with weights": (
        lambda x: F.layer_norm(x, (3, 4), torch.ones(3, 4) * 2, torch.arange(12.0).reshape(3, 4)),
        lambda x: 2 * standardised(x, (1, 2)) + jnp.arange(12.0).reshape(3, 4),
    ),
    "batch norm": (
        lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
        lambda x: standardised(x, (0, 2)) * of_channels(WEIGHT) + of_channels(BIAS),
    ),
    "batch norm in evaluation": (
        lambda x: F.batch_norm(x, WEIGHT, BIAS.abs() + 1, BIAS, WEIGHT),
        lambda x: (
            (x - of_channels(WEIGHT)) / jnp.sqrt(of_channels(BIAS.abs() + 1) + 1e-5) * of_channels(BIAS)
            + of_channels(WEIGHT)
        ),
    ),
    "instance norm": (
        lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS),
        lambda x: standardised(x, (2,)) * of_channels(WEIGHT) + of_channels(BIAS),
    ),
    "group norm": (lambda x: F.group_norm(x, 1), lambda x: standardised(x, (1, 2))),
    "RMS norm": (
        lambda x: F.rms_norm(x, (4,), eps=1e-5),
        lambda x: x / jnp.sqrt(jnp.square(x).mean(2, keepdims=True) + 1e-5),
    ),
    "normalize": (lambda x: F.normalize(x, dim=1), lambda x: x / jnp.sqrt(jnp.square(x).sum(1, keepdims=True))),
    "module": (torch.nn.LayerNorm(4).requires_grad_(False).forward, lambda x: standardised(x, (2,))),
}
THIRD = {
    "forward thrice": lambda f, x: jax.jacfwd(jax.jacfwd(jax.jacfwd(lambda t: f(x + t * jnp.cos(x)))))(0.0),
    "reverse thrice": lambda f, x: jax.grad(jax.grad(jax.grad(lambda t: f(x + t * jnp.cos(x)))))(0.0),
    "reverse over forward twice": lambda f, x: jax.jacrev(jax.jacfwd(jax.jacfwd(lambda t: f(x + t * jnp.cos(x)))))(0.0),
    "forward over reverse twice": lambda f, x: jax.jacfwd(jax.grad(jax.grad(lambda t: f(x + t * jnp.cos(x)))))(0.0),
}


def agree_in_second_and_third_derivatives(ours, twin, jit):
    actual = jit(every(SECOND | THIRD, torchleaf.torch_function(ours)))(X)
    close(actual, jax.jit(every(SECOND | THIRD, twin))(X), rtol=5e-3)


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("op", NORMS.values(), ids=NORMS)
def test_norms(op, jit):
    agree_in_second_and_third_derivatives(*op, jit)


def test_batch_norm_writes_its_statistics_in_every_derivative():
    """Composed of other ops it still says what torch says of running means."""

    def running(x, mean):
        mean = mean.clone()
        out = F.batch_norm(x, mean, torch.ones(3), training=True)
        return out, mean

    ours = torchleaf.torch_function(running)

    def curvature(x):
        return jax.jvp(lambda x: jax.jvp(lambda x: ours(x, jnp.zeros(3)), (x,), (along(x),))[1][0], (x,), (x,))

    close(ours(X, jnp.zeros(3))[1], 0.1 * X.mean((0, 2)))
    assert jnp.isfinite(curvature(X)[1]).all()


# --- other formulas ----------------------------------------------------------------------------------------------


def weight_norm_torch(axis, v):
    lengths = torch.linspace(0.5, 1.5, v.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
    return torch.tanh(torch._weight_norm(v, lengths, axis))


def weight_norm_jax(axis, v):
    lengths = jnp.linspace(0.5, 1.5, v.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
    others = tuple(i for i in range(3) if i != axis)
    return jnp.tanh(v * lengths / jnp.sqrt(jnp.square(v).sum(others, keepdims=True)))


FORMULAS = {
    "weight norm": (lambda v: weight_norm_torch(0, v), lambda v: weight_norm_jax(0, v)),
    "weight norm of the last axis": (lambda v: weight_norm_torch(2, v), lambda v: weight_norm_jax(2, v)),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 1), lambda x: jax.lax.cumlogsumexp(x, axis=1)),
    "logcumsumexp, a method": (lambda x: x.logcumsumexp(-1), lambda x: jax.lax.cumlogsumexp(x, axis=2)),
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.13
    CHUNKS = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=2)
    FORMULAS["linear cross entropy in chunks"] = (
        lambda x: F.linear_cross_entropy(x[0], x[1, :, :].cos(), torch.tensor([0, 2, 1]), options=CHUNKS),
        lambda x: -jnp.diag(jax.nn.log_softmax(x[0] @ jnp.cos(x[1]).T)[:, jnp.array([0, 2, 1])]).mean(),
    )


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("op", FORMULAS.values(), ids=FORMULAS)
def test_formulas_that_torch_has_wrong(op, jit):
    agree_in_second_and_third_derivatives(*op, jit)


WEIGHT_NORMS = {
    "old": lambda: torch.nn.utils.weight_norm(torch.nn.Linear(4, 3)),
    "parametrization": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3)),
    "of a convolution": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 2, 2)),
    "of another axis": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3), dim=1),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@eager_and_jit
@pytest.mark.parametrize("make", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
def test_weight_norm_modules(make, jit):
    """Hessian-vector products with respect to the weights, against differences of torch's gradients in float64."""
    with jax.enable_x64(True):
        module = make().double()
        model = torchleaf.TorchModule(module)
        x, names = jnp.asarray(X[0], jnp.float64), sorted(model.params)

        def loss(params):
            return jnp.sum(jnp.sin(eqx.tree_at(lambda m: m.params, model, params)(x)) ** 2)

        directions = {
            n: jnp.cos(jnp.arange(model.params[n].size, dtype=jnp.float64)).reshape(model.params[n].shape)
            for n in names
        }

        def products(params):
            forward = jax.jvp(jax.grad(loss), (params,), (directions,))[1]
            reverse = jax.grad(lambda p: sum(jnp.vdot(jax.grad(loss)(p)[n], directions[n]) for n in names))(params)
            return forward, reverse

        gradient = jax.grad(loss)
        ahead, behind = (gradient({n: model.params[n] + s * directions[n] for n in names}) for s in (1e-5, -1e-5))
        expected = {n: (ahead[n] - behind[n]) / 2e-5 for n in names}
        for product in jit(products)(model.params):
            assert_trees_close(product, expected, rtol=1e-5, atol=1e-8)


# --- losses ------------------------------------------------------------------------------------------------------

PREDICTION, TARGET = jnp.array([[0.3, -1.2, 2.0], [1.1, 0.4, -0.6]]), jnp.array([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4]])
LOSSES = {
    "mse": (F.mse_loss, lambda x, y: jnp.square(x - y).mean()),
    "huber": (
        lambda x, y: F.huber_loss(x, y, delta=0.5),
        lambda x, y: jnp.where(abs(x - y) < 0.5, jnp.square(x - y) / 2, 0.5 * (abs(x - y) - 0.25)).mean(),
    ),
    "smooth L1": (
        F.smooth_l1_loss,
        lambda x, y: jnp.where(abs(x - y) < 1, jnp.square(x - y) / 2, abs(x - y) - 0.5).mean(),
    ),
    "cross entropy": (F.cross_entropy, lambda x, y: -(y * jax.nn.log_softmax(x)).sum(1).mean()),
    "binary cross entropy": (
        F.binary_cross_entropy_with_logits,
        lambda x, y: (jax.nn.softplus(x) - x * y).mean(),
    ),
    "KL divergence": (
        lambda x, y: F.kl_div(x.log_softmax(1), y, reduction="batchmean"),
        lambda x, y: (y * (jnp.log(y) - jax.nn.log_softmax(x))).sum(1).mean(),
    ),
    "Poisson": (F.poisson_nll_loss, lambda x, y: (jnp.exp(x) - y * x).mean()),
    "squares": (lambda x, y: (x * y).square().sum(), lambda x, y: jnp.square(x * y).sum()),
    "linear": (
        lambda x, y: F.linear(x, y.sin(), y[:, 0]).square().sum(),
        lambda x, y: jnp.square(x @ jnp.sin(y).T + y[:, 0]).sum(),
    ),
    "product and sum": (
        lambda x, y: torch.addmm(y[:, :2], x, y.T).exp().sum(),
        lambda x, y: jnp.exp(y[:, :2] + x @ y.T).sum(),
    ),
    "choice": (
        lambda x, y: torch.where(x > 0, x.square() * y, y.square() * x).square().sum(),
        lambda x, y: jnp.square(jnp.where(x > 0, x**2 * y, y**2 * x)).sum(),
    ),
    "joined": (
        lambda x, y: torch.cat([x, y * y, y.new_zeros(1, 3)]).cumsum(0).square().sum(),
        lambda x, y: jnp.square(jnp.cumsum(jnp.concatenate([x, y * y, jnp.zeros((1, 3))]), 0)).sum(),
    ),
    "written into zeros": (
        lambda x, y: torch.zeros(2, 3).copy_(x * y).add_(y).square_().sum(),
        lambda x, y: jnp.square(x * y + y).sum(),
    ),
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_derivatives_by_one_argument(loss, jit):
    """The other's tangents are zeros, for which torch has tensors without memory."""

    def products(f):
        def of_one(loss, x):
            return (
                jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),)),
                jax.jvp(lambda x: jax.jvp(loss, (x,), (x,))[1], (x,), (jnp.cos(x),)),
                jax.grad(lambda x: jax.jvp(loss, (x,), (jnp.ones_like(x),))[1])(x),
                jax.vmap(lambda t: jax.jvp(jax.grad(loss), (x,), (t,))[1])(jnp.stack([x, jnp.cos(x), 0 * x])),
            )

        return lambda x, y: (of_one(lambda x: f(x, TARGET), x), of_one(lambda y: f(PREDICTION, y), y))

    ours, twin = loss
    actual = jit(products(torchleaf.torch_function(ours)))(PREDICTION, TARGET)
    close(actual, jax.jit(products(twin))(PREDICTION, TARGET))


# --- TorchScript -------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x.sin() * x


def scaled(x):
    return x.sin() * x


def sine_of_norm(x):
    return torch.layer_norm(x, (4,)).sin().sum()


SCRIPTED = {
    "function": lambda: torch.jit.script(scaled),
    "module": lambda: torch.jit.script(Scaled()),
    "traced": lambda: torch.jit.trace(Scaled(), torch.ones(3)),
    "in a module": lambda: torch.nn.Sequential(torch.nn.Identity(), torch.jit.script(Scaled())),
}


def trained(f):
    """torch alone has used it with gradients, so that its optimiser has done its work."""
    for _ in range(3):
        f(torch.ones(3, requires_grad=True)).sum().backward()
    return f


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@eager_and_jit
@pytest.mark.parametrize("before", [lambda f: f, trained], ids=["fresh", "used by torch"])
@pytest.mark.parametrize("make", SCRIPTED.values(), ids=SCRIPTED)
def test_scripted_code(make, before, jit):
    f = before(make())
    ours, x = torchleaf.torch_function(lambda x: f(x).sum()), jnp.linspace(-1.0, 2.0, 3)
    second, batch = 2 * jnp.cos(x) - x * jnp.sin(x), jnp.stack([x, x + 1, x - 1])
    hessians = jnp.stack([jnp.diag(2 * jnp.cos(x) - x * jnp.sin(x)) for x in batch])
    for _ in range(3):  # TorchScript's optimiser wants to see a few runs
        close(jit(jax.hessian(ours))(x), jnp.diag(second))
        close(jit(jax.jacrev(jax.jacrev(ours)))(x), jnp.diag(second))
        close(jit(jax.vmap(jax.hessian(ours)))(batch), hessians)
        close(jit(jax.vmap(jax.grad(ours)))(batch), jnp.sin(batch) + batch * jnp.cos(batch))
        close(jit(jax.grad(lambda xs: jax.vmap(ours)(xs).sum()))(batch), jnp.sin(batch) + batch * jnp.cos(batch))
        close(jit(lambda x: jax.jvp(ours, (x,), (x,)))(x)[1], jnp.vdot(jnp.sin(x) + x * jnp.cos(x), x))
    trained(f)
    close(jax.hessian(ours)(x), jnp.diag(second))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@eager_and_jit
def test_formulas_that_torch_has_wrong_are_refused_in_scripted_code(jit):
    """They cannot be replaced there; the remedy is to leave TorchScript out."""

    def curvature(f):
        return jit(lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (x,))[1], (x,), (jnp.cos(x),)))(X[0])

    scripted = torchleaf.torch_function(torch.jit.script(sine_of_norm))
    close(jit(jax.grad(scripted))(X[0]), jax.grad(lambda x: jnp.sin(standardised(x, (1,))).sum())(X[0]))
    with pytest.raises(Exception, match=r"TorchScript runs a (native )?layer norm.*Pass the function"):
        curvature(scripted)
    close(curvature(torchleaf.torch_function(sine_of_norm)), curvature(lambda x: jnp.sin(standardised(x, (1,))).sum()))


# --- third derivatives -------------------------------------------------------------------------------------------


def spread(x):
    return x @ x.T + torch.diag(torch.arange(3.0, dtype=x.dtype))


DECOMPOSITIONS = {
    "norm": lambda x: torch.linalg.norm(x),
    "norms": lambda x: torch.linalg.norm(x, dim=1),
    "nuclear norm": lambda x: torch.linalg.norm(x, "nuc"),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spread(x)),
    "eigh": lambda x: torch.linalg.eigh(spread(x))[1].square(),
    "svd": lambda x: torch.linalg.svd(x + torch.eye(3, dtype=x.dtype))[0].square(),
    "svdvals": torch.linalg.svdvals,
    "qr": lambda x: torch.linalg.qr(x + torch.eye(3, dtype=x.dtype))[1],
    "cholesky": lambda x: torch.linalg.cholesky(spread(x)),
    "pinv": torch.linalg.pinv,
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("op", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)
def test_decompositions(op, jit, x64):
    """Second derivatives against differences of the gradient, third ones against differences of second ones."""
    x = jnp.array([[0.9, 0.2, -0.4], [0.1, 1.7, 0.3], [0.5, -0.6, 2.6]])
    ours = torchleaf.torch_function(op)
    f = total(ours)
    gradients = [jax.grad(f)(x + s * jnp.cos(x)) for s in (1e-5, -1e-5)]
    curvatures = [jax.grad(jax.grad(lambda t: f(x + t * jnp.cos(x))))(s) for s in (1e-5, -1e-5)]
    second, third = ((ahead - behind) / 2e-5 for ahead, behind in (gradients, curvatures))
    expected = dict.fromkeys(SECOND, jnp.vdot(along(x), second)) | dict.fromkeys(THIRD, third)
    assert_trees_close(jit(every(SECOND | THIRD, ours))(x), expected, rtol=1e-4, atol=1e-6)
