"""Callables that raise errors by values: one program for all of them, which raises as torch does, or gives NaN."""

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch, torch_gradients
from meshes import run_on_devices
from torch import distributions
from torch.nn import functional as F

each_kind = pytest.mark.parametrize("strict", [False, True], ids=["raises", "strict"])


def _asserted(x):
    assert (x > 0).all(), "positive, please"
    return x.log()


def _asserted_by_torch(x):
    torch._assert((x > 0).all(), "positive, please")
    return x.log()


def _asserted_by_an_op(x):
    torch._assert_async((x > 0).all(), "positive, please")
    return x.log()


def _equal(x):
    if not torch.equal(x.abs(), x):
        raise ValueError("positive, please")
    return x.log()


def _close(x):
    if torch.allclose(x, -x.abs()):
        raise ValueError("positive, please")
    return x.sqrt()


def _several(x):
    for part in x.unbind():
        if part == 0:
            raise ZeroDivisionError("positive, please")
        if not part >= 0:
            raise ValueError("positive, please")
    return 1 / x


def _in_place(x):
    y = x.clone()
    y[1:] = y[1:] * 2
    if (y < 0).any():
        raise ValueError("positive, please")
    return y.sqrt()


def _complex(x):
    if (x < 0).any():
        raise ValueError("positive, please")
    return torch.complex(x.sqrt(), x)


def _with_integers(x):
    if (x < 0).any():
        raise ValueError("positive, please")
    return x.sqrt(), x.argmax(), x.int()


CHECKING = {
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, 0.5 * x, x),
    "Normal": lambda x: distributions.Normal(x.sin(), x).log_prob(x.cos()),
    "MultivariateNormal": lambda x: distributions.MultivariateNormal(x, scale_tril=x.diag()).log_prob(2 * x),
    "Gamma and KL": lambda x: distributions.kl_divergence(distributions.Gamma(x, 2 * x), distributions.Gamma(2.0, x)),
    "Dirichlet": lambda x: distributions.Dirichlet(x).entropy(),
    "transformed": lambda x: distributions.LogNormal(x, x).log_prob(x),
    "_assert": _asserted_by_torch,
    **{f.__name__: f for f in (_asserted, _asserted_by_an_op, _equal, _close, _several, _in_place, _complex)},
    "_with_integers": _with_integers,
}
each_callable = pytest.mark.parametrize("fn", CHECKING.values(), ids=CHECKING)
GOOD, BAD = np.array([0.5, 1.5, 2.0], np.float32), np.array([-0.5, -1.5, -2.0], np.float32)


@pytest.fixture(autouse=True)
def _checking():
    """`torch.compile`, where it has been used, has switched torch's checks off for the whole process."""
    kind = distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(True)
    yield
    kind.set_default_validate_args(before)


def by_xla(fn, **options):
    return torchleaf.torch_function(fn, engine="xla", **options)


def _total(tree):
    return sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))


@pytest.mark.long
@each_kind
@each_callable
def test_where_it_passes_it_is_as_in_torch(fn, strict):
    ours = by_xla(fn, strict=strict)
    assert_trees_close(jax.jit(ours)(GOOD), from_torch(fn(torch.tensor(GOOD))))
    assert_trees_close(jax.vmap(ours)(jnp.stack([GOOD])), jax.tree.map(lambda x: x[None], ours(GOOD)))

    def loss(x):
        return sum(y.abs().sum() for y in jax.tree.leaves(fn(x)) if y.is_floating_point() or y.is_complex())

    (expected,) = torch_gradients(loss, GOOD)
    assert_trees_close(jax.grad(lambda x: _total(ours(x)))(jnp.asarray(GOOD)), expected)


@pytest.mark.long
@each_callable
def test_where_it_fails_it_raises_what_torch_does(fn):
    with pytest.raises((ValueError, AssertionError, RuntimeError, ZeroDivisionError)) as torchs:
        fn(torch.tensor(BAD))
    words = str(torchs.value).split(" (")[0].split("\n")[0]
    ours, both = by_xla(fn), jnp.stack([GOOD, BAD])
    gradient = jax.grad(lambda x: _total(ours(x)))  # in whose program the value is not
    for run in (eqx.filter_jit(ours), eqx.filter_jit(gradient)):
        with pytest.raises(RuntimeError) as raised:
            run(BAD)
        assert f"{type(torchs.value).__name__}: {words}" in str(raised.value)
    with pytest.raises(RuntimeError, match=type(torchs.value).__name__):
        eqx.filter_jit(jax.vmap(ours))(both)
    ours(GOOD)


@pytest.mark.long
@pytest.mark.all_cases
@each_callable
def test_with_strict_it_is_nan_where_it_fails(fn):
    ours = by_xla(fn, strict=True)
    gradient = jax.grad(lambda x: _total(ours(x)))
    for x in jax.tree.leaves((ours(BAD), gradient(BAD))):
        assert jnp.issubdtype(x.dtype, jnp.integer) or jnp.isnan(x).all()
    values, gradients = jax.vmap(ours)(jnp.stack([GOOD, BAD])), jax.vmap(gradient)(jnp.stack([GOOD, BAD]))
    good = jax.tree.map(lambda x: x[0], (values, gradients))
    assert_trees_close(good, (ours(GOOD), gradient(GOOD)))  # each example by itself
    for x in jax.tree.leaves((values, gradients)):
        assert jnp.issubdtype(x.dtype, jnp.integer) or jnp.isnan(x[1]).all()


def test_the_line_is_named():
    with pytest.raises(RuntimeError, match=r"ValueError: positive, please \(in .*test_value_checks\.py:\d+ \(`raise"):
        eqx.filter_jit(by_xla(_in_place))(BAD)


@pytest.mark.long
def test_results_that_cannot_be_nan():
    def draws(p):
        return distributions.Categorical(probs=p).sample((4,))

    p = jnp.array([0.0, 1.0, 0.0])
    assert_trees_close(by_xla(draws)(p, key=jax.random.key(0)).astype(jnp.int32), jnp.ones(4, jnp.int32))
    with pytest.raises(RuntimeError, match="Simplex"):
        eqx.filter_jit(lambda p: by_xla(draws)(p, key=jax.random.key(0)))(2 * p - 1)
    with pytest.raises(torchleaf.TorchCallError, match=r"(?s)raised ValueError.*Simplex.*by strict=True.*with a NaN"):
        by_xla(draws, strict=True)(p, key=jax.random.key(0))


# --- what is no check ------------------------------------------------------------------------------


def _decides_after_a_check(x):
    if (x < 0).any():
        raise ValueError("positive, please")
    if x.sum() > 1:
        return x.sin()
    return x.cos()


def _catches(x):
    try:
        if x.sum() > 1:
            raise ValueError("caught below")
        return x.sin()
    except ValueError:
        return x.cos()


def _fails_in_an_op(x):
    if x.sum() > 1:
        return x + torch.zeros(2)
    return x


def _makes_a_shape(x):
    if x.sum() > 1:
        return x[x > 0]
    raise ValueError("large, please")


def _counts(x):
    if int(x.sum()) > 1:
        raise ValueError("small, please")
    return x


@pytest.mark.all_cases
@pytest.mark.parametrize(
    ("fn", "line"),
    [
        (_decides_after_a_check, r"if x\.sum\(\) > 1:"),
        (_catches, r"if x\.sum\(\) > 1:"),
        (_fails_in_an_op, r"if x\.sum\(\) > 1:"),
        (_makes_a_shape, r"if x\.sum\(\) > 1:|x\[x > 0\]"),
        (_counts, r"if int\(x\.sum\(\)\) > 1:"),
    ],
)
def test_what_decides_by_a_value_is_refused(fn, line):
    with pytest.raises(torchleaf.TorchCallError, match=rf"depends on values.*{line}|reads values.*{line}"):
        by_xla(fn)(GOOD)
    with pytest.raises(torchleaf.TorchCallError, match=rf"depends on values.*{line}|reads values.*{line}"):
        by_xla(fn, out_shape=jax.ShapeDtypeStruct((3,), jnp.float32))(GOOD)


def test_a_function_with_a_derivative_of_its_own_checks_by_itself():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if (x < 0).any():
                raise ValueError("positive, please")
            ctx.save_for_backward(x.sqrt())
            return x.sqrt()

        @staticmethod
        def backward(ctx, grad):
            (root,) = ctx.saved_tensors
            return grad / root

    ours = by_xla(lambda x: Root.apply(x) if distributions.Normal(x, x).mean is not None else x)
    assert_trees_close(ours(GOOD), jnp.sqrt(GOOD))
    assert_trees_close(jax.grad(lambda x: ours(x).sum())(GOOD), 1 / jnp.sqrt(GOOD))
    with pytest.raises((RuntimeError, ValueError), match=r"positive, please|parameter scale"):
        jax.block_until_ready(ours(BAD))


def test_a_constant_is_checked_while_it_is_traced():
    def fn(x, limit):
        if torch.tensor(limit) < 0:
            raise ValueError("positive, please")
        return distributions.Normal(torch.zeros(3), x).log_prob(x)

    assert_trees_close(by_xla(fn)(GOOD, 1.0), from_torch(fn(torch.tensor(GOOD), 1.0)))
    with pytest.raises(torchleaf.TorchCallError, match="positive, please"):
        by_xla(fn)(GOOD, -1.0)


def test_dtypes_that_torch_does_not_compare():
    def fn(x):
        if not torch.allclose(x, x.double()):
            raise ValueError("close, please")
        return x

    with pytest.raises(torchleaf.TorchCallError, match="must have the same dtype"):
        by_xla(fn)(GOOD)


# --- modules, exports, devices ---------------------------------------------------------------------


class Checking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.scale = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)

    def forward(self, x, y):
        x = self.norm(x)
        return -distributions.Normal(x, F.softplus(self.scale(x))).log_prob(y).mean()


def test_a_module_with_state():
    torch.manual_seed(0)
    module, rng = Checking(), np.random.default_rng(0)
    x, y = (rng.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module, engine="xla")
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda model, *args: model(*args), has_aux=True))
    (value, state), gradients = loss(model, x, y, state)
    expected = module(torch.tensor(x), torch.tensor(y))
    expected.backward()
    assert_trees_close(value, from_torch(expected.detach()))
    for name, parameter in module.named_parameters():
        assert_trees_close(gradients.params[name], from_torch(parameter.grad))
    assert_trees_close(from_torch(torchleaf.state_dict(model, state)), from_torch(dict(module.state_dict())))
    with pytest.raises(RuntimeError, match="within the support"):
        loss(model, x, jnp.full_like(y, jnp.nan), state)


def test_exported_for_all_sizes():
    ours = by_xla(CHECKING["Normal"], strict=True)
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: ours(x)), platforms=["cpu", "tpu"])(spec)
    program = jax.export.deserialize(program.serialize())
    assert_trees_close(program.call(GOOD), from_torch(CHECKING["Normal"](torch.tensor(GOOD))))
    assert jnp.isnan(program.call(jnp.tile(BAD, 2))).all()


@pytest.mark.long
def test_on_several_devices():
    out = run_on_devices(
        """
        fn = lambda x: torch.distributions.Normal(x, x).log_prob(x * 2)
        expected = fn(torch.tensor(np.asarray(abs(x)))).numpy()
        for strict in (False, True):
            ours = torchleaf.torch_function(fn, engine="xla", strict=strict)
            mesh = mesh_of(batch=2)
            manual = jax.shard_map(ours, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
            for run in (jax.jit(ours), jax.jit(jax.vmap(ours)), jax.jit(manual)):
                assert_close(np.asarray(run(put(abs(x), mesh, "batch"))), expected)
                print(jnp.isnan(run(put(-abs(x), mesh, "batch"))).all())  # an error would leave devices waiting
        """,
        2,
    )
    assert out.split() == ["True"] * 6
