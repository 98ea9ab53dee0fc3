"""`torch_function`: which callables it takes and how arguments reach them."""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import as_torch
from torch.nn import functional as F
from torchleaf import torch_function

pytestmark = pytest.mark.both_engines

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


# --- callables ------------------------------------------------------------------------------------


class Scaler:
    factor = 3.0

    def scale(self, x):
        return x * self.factor

    @torch_function
    def decorated(self, x, *, shift=0.0):
        return x * self.factor + shift

    @classmethod
    def of_class(cls, x):
        return x * cls.factor

    @staticmethod
    def static(x):
        return x * 3.0

    def __call__(self, x):
        return x * self.factor


CALLABLES = {
    "lambda": lambda x: x * 3,
    "builtin": functools.partial(torch.mul, other=3),
    "bound method": Scaler().scale,
    "classmethod": Scaler.of_class,
    "staticmethod": Scaler.static,
    "callable object": Scaler(),
    "partial": functools.partial(Scaler.scale, Scaler()),
    "module's forward": torch.nn.Threshold(-100.0, 0.0).forward,
    "torch.compile'd off": torch.compiler.disable(lambda x: x * 3),
}


@eager_and_jit
@pytest.mark.parametrize("kind", CALLABLES)
def test_callable(kind, jit):
    fn = CALLABLES[kind]
    assert_trees_close(jit(torch_function(fn))(X), from_torch(fn(as_torch(X))))


@eager_and_jit
def test_method_of_a_class_body(jit):
    scaler = Scaler()
    assert_trees_close(jit(scaler.decorated)(X), 3 * X)
    assert_trees_close(jit(lambda x, s: scaler.decorated(x, shift=s))(X, jnp.ones(3)), 3 * X + 1)
    assert_trees_close(Scaler.decorated(scaler, X), 3 * X)


def test_decorator_keeps_name_and_docstring():
    @torch_function
    def plain(x):
        """Doc."""
        return x

    @torch_function(vmap_method="loop", forward_mode=False)
    def with_options(x):
        """Doc of another."""
        return x

    assert (plain.__name__, plain.__doc__) == ("plain", "Doc.")
    assert (with_options.__name__, with_options.__doc__) == ("with_options", "Doc of another.")
    assert_trees_close(plain(X), X)
    assert_trees_close(with_options(X), X)


@eager_and_jit
def test_functions_of_torch(jit):
    x = as_torch(X)
    assert_trees_close(jit(torch_function(torch.relu))(X), from_torch(torch.relu(x)))
    assert_trees_close(jit(torch_function(torch.add))(X, X), from_torch(torch.add(x, x)))
    assert_trees_close(torch_function(torch.add)(X, X, alpha=3), from_torch(torch.add(x, x, alpha=3)))
    assert_trees_close(jit(torch_function(torch.linalg.svdvals))(X), from_torch(torch.linalg.svdvals(x)))
    assert_trees_close(jit(torch_function(F.softplus))(X), from_torch(F.softplus(x)))
    assert_trees_close(jit(torch_function(torch.Tensor.mT.__get__))(X), X.T)
    assert_trees_close(jit(torch_function(torch.stack))([X, X]), jnp.stack([X, X]))
    assert_trees_close(torch_function(torch.einsum)("ij,kj->ik", X, X), X @ X.T)


# --- arguments ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    image: Any
    label: Any


class Model(eqx.Module):
    weight: Any
    bias: Any
    power: int = eqx.field(static=True)


def _affine(model, batch, *, scale=1.0, mode=None):
    y = (batch.image @ model.weight + model.bias[0]["b"]) ** model.power * scale
    return {"y": y, "label": batch.label, "mode": mode}


@eager_and_jit
def test_any_pytree_in_and_out(jit):
    weight, bias, label = jnp.arange(12.0).reshape(3, 4) / 5, jnp.ones(4), jnp.array([1, 2], jnp.int16)
    model, batch = Model(weight, [{"b": bias}], 2), Batch(X, label)
    got = jit(lambda m, b, s: torch_function(_affine)(m, b, scale=s))(model, batch, jnp.float32(0.5))
    assert_trees_close(got, {"y": (X @ weight + bias) ** 2 * 0.5, "label": label, "mode": None})


def test_keyword_arrays_are_differentiable():
    def torch_loss(x, *, weight, extra):
        return ((x @ weight["w"]).tanh() + extra[0]).square().sum()

    def jax_loss(x, *, weight, extra):
        return jnp.square(jnp.tanh(x @ weight["w"]) + extra[0]).sum()

    weight, extra = {"w": jnp.arange(12.0).reshape(3, 4) / 9}, [jnp.linspace(-1, 1, 4)]
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        got, expected = (
            transform(lambda kw, loss=loss: loss(X, **kw))({"weight": weight, "extra": extra})
            for loss in (torch_function(torch_loss), jax_loss)
        )
        assert_trees_close(got, expected)


def _everything(a, /, b, c=2.0, *args, d, e=None, **kwargs):
    total = a + 10 * b + 100 * c + 1000 * d + sum(args) + sum(kwargs.values())
    return total if e is None else total + e


@eager_and_jit
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1.0, 2.0), {"d": 3.0}),
        ((1.0,), {"b": 2.0, "d": 3.0}),
        ((1.0, 2.0, 3.0), {"d": 4.0, "e": 5.0}),
        ((1.0, 2.0, 3.0, 4.0, 5.0), {"d": 6.0}),
        ((1.0, 2.0), {"d": 3.0, "c": 4.0, "x": 5.0, "y": 6.0}),
    ],
)
def test_every_kind_of_parameter(jit, args, kwargs):
    as_arrays = jax.tree.map(lambda v: jnp.float32(v), (args, kwargs))
    got = jit(lambda a, k: torch_function(_everything)(*a, **k))(*as_arrays)
    assert_trees_close(got, jnp.float32(_everything(*args, **kwargs)))


def test_static_arguments_arrive_as_they_are():
    seen = []

    @torch_function
    def look(x, *values):
        seen.append(values)
        return x

    values = (True, 3, 2.5, "name", None, torch.float64, 1j, (1, "nested"), {"k": False}, len, torch.nn.Identity)
    look(X, *values)
    for got in seen:
        assert got == values
        assert [type(v) for v in got] == [type(v) for v in values]


@pytest.mark.parametrize(
    "values",
    [
        (1, 1.0, True, 1 + 0j),
        (0, 0.0, -0.0, False, None, ""),
        (torch.float32, torch.float64, "float32", "float64"),
        (math.nan, math.inf, -math.inf),
        (np.dtype("float32"), np.dtype("float64")),
        ((), [], {}),
    ],
    ids=["ones", "zeros", "dtypes", "special floats", "numpy dtypes", "empty containers"],
)
def test_equal_looking_statics_are_told_apart(values):
    describe = torch_function(lambda x, value: (x, f"{type(value).__name__} {value!r}"))
    for _ in range(2):
        for value in values:
            assert describe(X, value)[1] == f"{type(value).__name__} {value!r}"


def test_static_chooses_code():
    @torch_function
    def pick(x, name: str, *, dtype=torch.float32, negate: bool = False):
        y = getattr(torch, name)(x).to(dtype)
        return -y if negate else y

    assert_trees_close(pick(X, "exp"), jnp.exp(X))
    assert_trees_close(pick(X, "sin", negate=True), -jnp.sin(X))
    assert_trees_close(jax.jit(lambda x: pick(x, "sin", dtype=torch.float16))(X), jnp.sin(X).astype(jnp.float16), 1e-3)


# --- properties -----------------------------------------------------------------------------------


arrays = st.tuples(
    st.sampled_from([jnp.float32, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 5),
).map(lambda x: (jnp.arange(math.prod(x[1])).reshape(x[1]) % 7 + x[2]).astype(x[0]))
trees = st.recursive(
    st.one_of(arrays, st.none(), st.sampled_from(["static", 2, True])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Batch, inner, inner),
        st.builds(lambda x: Model(x, None, 1), inner),
    ),
    max_leaves=4,
)


def _is_array(x):
    return isinstance(x, jax.Array | torch.Tensor)


def _arithmetic(args, kwargs):
    """The same Python for torch and for JAX: each array by itself, and its size in the place of statics."""

    def one(x):
        return (x + x) * x if _is_array(x) else x

    return jax.tree.map(one, {"args": args, "kwargs": kwargs}), sum(map(_is_array, jax.tree.leaves((args, kwargs))))


@pytest.mark.long
@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(
    args=st.lists(trees, max_size=3),
    kwargs=st.dictionaries(st.sampled_from("xyz"), trees, max_size=2),
    jit=st.booleans(),
)
def test_random_trees(args, kwargs, jit):
    fn = torch_function(lambda *args, **kwargs: _arithmetic(args, kwargs))
    if jit:
        dynamic, static = eqx.partition((tuple(args), kwargs), _is_array)

        def merged(dynamic):
            args, kwargs = eqx.combine(dynamic, static)
            return fn(*args, **kwargs)

        got = eqx.filter_jit(merged)(dynamic)
    else:
        got = fn(*args, **kwargs)
    assert_trees_close(got, _arithmetic(tuple(args), kwargs))
