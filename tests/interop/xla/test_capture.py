"""Capture: what a torch callable does becomes a function, once per signature; what cannot become one is an error."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch, torch_gradients
from torchleaf.interop.types import CallOptions

pytestmark = pytest.mark.all_cases


def by_xla(fn, **options):
    return torchleaf.torch_function(fn, engine="xla", strict=True, **options)


def _views(x):
    y = x.clone()
    y[1:3] += 1
    z = y.view(2, 3)
    z.mul_(2)
    z.t()[0].sub_(5)
    y.relu_()
    return y, z, z[:, 1]


def _constants(x):
    mask = torch.zeros(6)
    mask[2:] = 1
    made = torch.zeros(3)
    made.add_(x[:3])
    made[0] = 7
    return mask * x, made, made.view(3, 1)


def _strided(x):
    y = x.clone().view(2, 3)
    y[:, ::2].copy_(torch.arange(4.0).view(2, 2))
    y.diagonal().fill_(-1)
    y.T[2].mul_(x[:2])
    return y


def _out(x):
    target = torch.empty(6)
    torch.add(x, 1, out=target)
    parts = target.chunk(2)
    parts[1].zero_()
    made = torch.add(x, 1, out=torch.empty(0))  # which gets a shape by it
    made[1:].mul_(2)
    return target, parts, made


def _resized(x):
    y = (x * 2).view(2, 3)
    turned = y.t()
    y.resize_(2, 2)
    y.mul_(3)
    more = x.view(3, 2).t().clone()  # in the order of its columns
    more.resize_(4, 3)
    more[:2].add_(1)
    one, number = x[:1].clone().resize_(()), x.sum().resize_(1, 1)
    return y, turned, more[:2], (x + 1)[2:].resize_as_(torch.zeros(2, 2)), one, number


def _geometry(x):
    y = x.clone().view(2, 3)
    y.t_()
    y.add_(1)
    y.unsqueeze_(0)
    return y, y.sum(1)


def _indices(x):
    y = x.clone()
    y[torch.tensor([0, 0, -1])] = torch.tensor([1.0, 1.0, 2.0])
    y.index_put_((torch.tensor([1, 1, 2]),), x[:3], accumulate=True)
    y[x > 1] = 0.5
    return y.masked_fill_(x < 0, 3)


@pytest.mark.long
@pytest.mark.parametrize(
    "fn", [_views, _constants, _strided, _out, _resized, _geometry, _indices], ids=lambda f: f.__name__
)
def test_writes_and_views_become_a_function(fn):
    x = torch.tensor([-2.0, 0.3, 1.5, -0.7, 2.2, 4.0])
    given = from_torch(x)
    assert_trees_close(by_xla(fn)(given), from_torch(fn(x)))
    assert_trees_close(given, from_torch(x))

    if fn in (_out, _resized):  # torch does not differentiate by it
        return

    def total(function):
        return lambda x: sum(y.sin().sum() for y in jax.tree.leaves(function(x)))

    ours = jax.grad(lambda x: sum(jnp.sin(y).sum() for y in jax.tree.leaves(by_xla(fn)(x))))(given)
    assert_trees_close((ours,), torch_gradients(total(fn), given), rtol=1e-5)


def _places(n, dtype=torch.float32):
    return torch.empty(n, dtype=dtype), torch.empty(n, dtype=torch.int64)


INTO_PLACES = {
    "div": lambda x: torch.div(x, 2 * x + 9, out=_places(6)[0]),
    "div, rounded": lambda x: torch.div(x, 0.3, rounding_mode="floor", out=_places(6)[0]),
    "div by a mode": lambda x: torch.div(x, x * 0 + 0.3, rounding_mode="trunc", out=_places(6)[0]),
    "max of two": lambda x: torch.max(x, x.flip(0), out=_places(6)[0]),
    "min of two": lambda x: torch.min(x, x.flip(0), out=_places(6)[0]),
    "max along an axis": lambda x: torch.max(x.view(2, 3), 1, out=_places(2)),
    "min along an axis": lambda x: torch.min(x.view(2, 3), 1, out=_places(2)),
    "median": lambda x: torch.median(x.view(2, 3), 1, out=_places(2)),
    "nanmedian": lambda x: torch.nanmedian(x.view(2, 3), 1, out=_places(2)),
    "sort": lambda x: torch.sort(x, out=_places(6)),
    "stable sort": lambda x: torch.sort(x, stable=True, out=_places(6)),
}


@pytest.mark.parametrize("fn", INTO_PLACES.values(), ids=INTO_PLACES)
def test_results_into_places(fn):
    """Of ops whose variants with `out` have names unlike those without."""
    x = torch.tensor([-2.0, 0.3, 1.5, -0.7, 2.2, 4.0])
    assert_trees_close(tuple(jax.tree.leaves(by_xla(fn)(from_torch(x)))), from_torch(tuple(jax.tree.leaves(fn(x)))))


def test_arguments_of_every_structure():
    def fn(pair, *, scale, mode, names=None):
        x, (y, n) = pair["x"], pair["rest"]
        assert names == ("a", "b")
        return {"sum": (x + y) * scale, "static": (mode, n, None, x.dtype), "list": [x.mean(), y > 0]}

    x, y, scale = torch.randn(3), torch.randn(3), torch.tensor(2.5)
    ours = by_xla(fn)
    given = from_torch({"x": x, "rest": (y, 4)})
    actual = ours(given, scale=from_torch(scale), mode="m", names=("a", "b"))
    expected = fn({"x": x, "rest": (y, 4)}, scale=scale, mode="m", names=("a", "b"))
    assert actual["static"] == expected["static"]
    assert_trees_close(actual, from_torch(expected))


def test_it_is_captured_once_per_signature():
    runs = []

    def fn(x, flag):
        runs.append(x.shape)
        return x * 2 if flag else x + 1

    ours = by_xla(fn)
    ours(jnp.ones(3), True)
    n = len(runs)
    assert n >= 1
    for _ in range(3):
        jax.jit(lambda x: ours(x, True))(jnp.ones(3))
        jax.grad(lambda x: ours(x, True).sum())(jnp.ones(3))
        jax.vmap(lambda x: ours(x, True))(jnp.ones((2, 3)))
    assert len(runs) == n
    assert_trees_close(ours(jnp.ones(3), False), jnp.full(3, 2.0))
    ours(jnp.ones(4), True)
    assert len(runs) == 3 * n


def test_captured_tensors_are_constants():
    table = torch.randn(5, 2)
    ours = by_xla(lambda i: table[i] @ table.T)
    i = torch.tensor([0, 3, -1])
    assert_trees_close(ours(from_torch(i)), from_torch(table[i] @ table.T), rtol=1e-5)


def test_the_largest_integers_of_masks_stay_the_largest():
    ours = by_xla(lambda x: torch.where(x > 0, x, torch.iinfo(torch.int64).min).amax() + 0 * x)
    assert_trees_close(ours(jnp.array([3, -1])), jnp.array([3, 3]))


# --- derivatives that a user's code decides about ------------------------------------------------------


def _detached(x):
    return (x * x.detach()).sum() + (x.data * 3).sum()


def _without_gradients(x):
    with torch.no_grad():
        y = x * 2
    return (x * y).sum()


def _written_without_gradients(x):
    y = x * 1
    with torch.no_grad():
        y.clamp_min_(0.5)
    return (y * x).sum()


def _own_gradient(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((y**3).sum(), y)
    return (g * x).sum()


def _differentiates(x):
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.tanh(x).pow(2).sum(), x, create_graph=True)
    return (g * x).sum()


@pytest.mark.parametrize(
    "fn",
    [_detached, _without_gradients, _written_without_gradients, _own_gradient, _differentiates],
    ids=lambda f: f.__name__,
)
def test_gradients_stop_where_torch_stops_them(fn):
    x = jnp.array([-1.0, 0.2, 0.7, 2.0])
    ours = by_xla(fn)
    assert_trees_close(ours(x), from_torch(fn(torch.from_numpy(np.array(x)))), rtol=1e-5)
    assert_trees_close((jax.grad(ours)(x),), torch_gradients(fn, x), rtol=1e-5)


def test_what_torchs_own_python_detaches():
    """Not seen by function modes: the straight-through estimator, and the norm of rows that are looked up."""

    def choice(x, hard):
        return (torch.nn.functional.gumbel_softmax(x, hard=hard) * torch.arange(4.0)).sum()

    x, key = jnp.array([-1.0, 0.2, 0.7, 2.0]), jax.random.key(0)
    hard, soft = (jax.grad(lambda x, h=h: by_xla(choice)(x, h, key=key))(x) for h in (True, False))
    assert jnp.any(soft)
    assert_trees_close(hard, soft, rtol=1e-5)

    embedding = torch.nn.Embedding(5, 3, max_norm=0.5)
    model, ids = torchleaf.TorchModule(embedding, engine="xla", copy=True), torch.tensor([1, 2, 1])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(eqx.tree_at(lambda m: m.params, model, p)(from_torch(ids)) ** 2)))
    actual = grads(model.params)
    (embedding(ids) ** 2).sum().backward()
    assert_trees_close(actual, from_torch({"weight": embedding.weight.grad}), rtol=1e-5)


@pytest.mark.long
def test_torch_func_inside():
    ours = by_xla(lambda x: torch.func.vmap(torch.func.grad(lambda y: torch.sin(y).prod()))(x))
    x = jnp.arange(6.0).reshape(3, 2)
    expected = jax.vmap(jax.grad(lambda y: jnp.sin(y).prod()))(x)
    assert_trees_close(ours(x), expected, rtol=1e-5)
    assert_trees_close(
        jax.grad(lambda x: ours(x).sum())(x),
        jax.grad(lambda x: jax.vmap(jax.grad(lambda y: jnp.sin(y).prod()))(x).sum())(x),
        rtol=1e-5,
    )


# --- errors --------------------------------------------------------------------------------------------


def test_a_value_that_is_read_is_an_error_with_its_line():
    def reads(x):
        if x.sum() > 0:
            return x
        return -x

    with pytest.raises(torchleaf.TorchCallError, match=r"reads values.*test_capture\.py:\d+ \(`if x\.sum\(\) > 0:`\)"):
        by_xla(reads)(jnp.ones(3))
    with pytest.raises(torchleaf.TorchCallError, match=r"shape depends on values.*engine='torch'"):
        by_xla(lambda x: x[x > 0])(jnp.ones(3))


def test_a_value_of_a_constant_can_be_read():
    limit = torch.tensor(3.0)
    ours = by_xla(lambda x: x * 2 if limit > 2 else x)
    assert_trees_close(ours(jnp.ones(2)), jnp.full(2, 2.0))


def test_impure_code_is_an_error_as_in_the_other_engine():
    kept = []
    with pytest.raises(torchleaf.TorchCallError, match="keeps argument"):
        by_xla(lambda x: kept.append(x) or x * 2)(jnp.ones(3))
    total = torch.zeros(3)
    with pytest.raises(torchleaf.TorchCallError, match="captured from outside"):
        by_xla(lambda x: total.add_(x))(jnp.ones(3))


def test_torchs_own_errors_are_quoted():
    with pytest.raises(torchleaf.TorchCallError, match=r"(?s)lambda.*failed on operands.*torch said"):
        by_xla(lambda x, y: x @ y)(jnp.ones((2, 3)), jnp.ones((2, 3)))


def test_options_are_checked():
    with pytest.raises(ValueError, match="engine must be 'torch' or 'xla', got 'tpu'"):
        CallOptions.__post_init__(
            SimpleNamespace(**{**vars(CallOptions()), "engine": "tpu"})
        )  # before types are checked
    with pytest.raises(ValueError, match="strict=True is for engine='xla'"):
        torchleaf.torch_function(torch.sin, strict=True)


def test_data_that_is_set_is_what_is_read():
    def swap(x):
        y = x * 2
        before = y.sum()
        y.data = x + 1
        return before, y * 3

    x = torch.arange(3.0)
    found = torchleaf.torch_function(swap, engine="xla")(from_torch(x))
    assert_trees_close(found, from_torch(swap(x)))


OVERLAPPING = {
    "add": lambda y: y.add_(1),
    "items": lambda y: torch.Tensor.__setitem__(y, torch.tensor([0, 2]), 5.0),
    "masked": lambda y: y.masked_fill_(y > 0, 5.0),
    "triangle": lambda y: y.tril_(),
    "strides": lambda y: y[0].as_strided((2, 2), (1, 1)).mul_(2),
}


@pytest.mark.parametrize("write", OVERLAPPING.values(), ids=OVERLAPPING)
def test_writes_where_elements_share_memory_are_refused(write):
    def fn(x):
        y = x.clone()
        write(y.expand(4, 3))
        return y

    with pytest.raises(torchleaf.TorchCallError, match="more than one element refers to a single memory"):
        torchleaf.torch_function(fn, engine="xla")(jnp.ones(3))


def test_expanded_tensors_are_filled():
    def fn(x):
        y = x.clone()
        y.expand(4, 3).fill_(2).expand(1, 4, 3)[:, 1:].zero_()
        return y + x

    x = jnp.arange(3.0)
    assert_trees_close(torchleaf.torch_function(fn, engine="xla")(x), torchleaf.torch_function(fn)(x))


STRIDED = {
    "transposed": lambda y: y.t().as_strided((2, 3, 4), (2, 4, 1)),
    "permuted and split": lambda y: y.view(2, 2, 6).transpose(0, 1).reshape(2, 2, 6).as_strided((3, 4), (3, 1)),
    "from a place": lambda y: y[:, ::2].as_strided((3, 2), (2, 6), 6),
    "backwards": lambda y: y.flip(0).t().as_strided((4, 4), (1, 5)),
    "after a write": lambda y: (y.t().mul_(2), y[1:].as_strided((3, 4), (5, 1)))[1],
    "in place": lambda y: y.t().as_strided_((4, 4), (1, 5)),
    "written through": lambda y: (y.t().as_strided((2, 2), (1, 7)).mul_(3), y)[1],
}


@pytest.mark.all_cases
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides_are_those_of_memory(view):
    def fn(x):
        return view(torch.sin(x))

    x = torch.randn(4, 6, requires_grad=True)
    expected = fn(x)
    (expected**2).sum().backward()
    ours = torchleaf.torch_function(fn, engine="xla", strict=True)
    assert_trees_close(ours(from_torch(x)), from_torch(expected))
    assert_trees_close(jax.grad(lambda x: jnp.sum(ours(x) ** 2))(from_torch(x)), from_torch(x.grad), rtol=1e-5)


def test_memory_beyond_a_view():
    """torch's gradient leaves out what the view does not show; here it is the derivative."""

    def fn(x):
        return torch.sin(x)[1:, 2:].as_strided((3, 4), (5, 1))

    x = torch.randn(4, 6)
    assert_trees_close(torchleaf.torch_function(fn, engine="xla", strict=True)(from_torch(x)), from_torch(fn(x)))


def test_a_scatter_by_strides_wants_memory_in_order():
    fn = torchleaf.torch_function(lambda x: torch.as_strided_scatter(x.t(), x[0], (3,), (1,)), engine="xla")
    with pytest.raises(torchleaf.TorchCallError, match=r"as_strided_scatter.* not contiguous"):
        fn(jnp.ones((3, 3)))
