"""One trace for each signature of a `torch_function`, whatever JAX does with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf.interop.tracing.specialize as specialize_module
from compare import assert_trees_close
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import torch_function

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


class Counter:
    """A torch function that counts how often it was traced (on fake tensors) and how often it ran."""

    def __init__(self):
        self.traced = self.ran = 0

    def __call__(self, x, scale=1.0, **others):
        fake = isinstance(x, FakeTensor)
        self.traced, self.ran = self.traced + fake, self.ran + (not fake)
        return x.sin() * scale

    def new(self) -> tuple[int, int]:
        """Traces and runs since the last time."""
        counts = self.traced, self.ran
        self.traced = self.ran = 0
        return counts


def test_eager_and_jitted_calls_share_a_trace():
    counter = Counter()
    fn = torch_function(counter, replay=False)
    fn(X)
    assert counter.new() == (1, 1)
    fn(X + 1)
    jax.jit(fn)(X)
    jax.jit(lambda x: fn(x) + fn(2 * x))(X)
    assert counter.new() == (0, 4)
    jitted = jax.jit(fn)
    for _ in range(3):
        jitted(X)
    jax.block_until_ready(jitted(X))
    assert counter.new() == (0, 4)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X[:1],), {}),
        ((X[None],), {}),
        ((X.astype(jnp.float16),), {}),
        ((X, 2.0), {}),
        ((X,), {"scale": 1.0}),
        ((X, jnp.float32(1.0)), {}),
        ((X, 1), {}),
    ],
    ids=["shape", "rank", "dtype", "static", "keyword", "array for static", "int for float"],
)
def test_new_signature_is_traced_once(args, kwargs):
    counter = Counter()
    fn = torch_function(counter)
    fn(X, 1.0)
    fn(X)
    counter.new()
    for _ in range(2):
        assert_trees_close(fn(*args, **kwargs), jnp.sin(args[0]) * (args[1] if len(args) > 1 else 1), 1e-3)
    assert counter.new() == (1, 2)
    fn(X, 1.0)
    fn(X)
    assert counter.new() == (0, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (X, np.array(X)),
        (X, X.T.reshape(2, 3)),
        (jnp.ones(()), jnp.sin(1.0)),
        (np.float32(1.0), jnp.ones(())),
        (jnp.full(3, 1.0), jnp.asarray([1.0, 2.0, 3.0], jnp.float32)),
    ],
    ids=["numpy", "another array", "weakly typed", "numpy scalar", "weak vector"],
)
def test_same_signature_is_not_traced_again(first, second):
    counter = Counter()
    fn = torch_function(counter)
    fn(first)
    assert counter.new() == (1, 1)
    fn(second)
    assert counter.new() == (0, 1)


def test_order_of_keywords_does_not_matter():
    counter = Counter()
    fn = torch_function(counter)
    fn(X, a=X, b=2)
    fn(X, b=2, a=X)
    assert counter.new() == (1, 2)


@pytest.fixture
def traces(monkeypatch):
    """The operand shapes of every trace; derivatives try the function on fake tensors, which is no trace."""
    shapes = []
    original = specialize_module.trace

    def counting(traced: Any, **options: Any) -> Any:
        shapes.append([shape for shape, _ in traced.specs])
        return original(traced, **options)

    monkeypatch.setattr(specialize_module, "trace", counting)
    return shapes


TRANSFORMS = {
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "jit grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "value_and_grad": lambda f: jax.value_and_grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum()),
    "vmap over nothing it sees": lambda f: lambda x: jax.vmap(lambda s: f(x) * s)(jnp.arange(2.0)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0],
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
    "eval_shape": lambda f: lambda x: (jax.eval_shape(f, x), x)[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_do_not_trace_again(name, traces):
    fn = torch_function(lambda x: x.sin())
    fn(X)
    assert traces == [[(2, 3)]]
    for _ in range(2):
        jax.block_until_ready(TRANSFORMS[name](fn)(X))
    assert traces == [[(2, 3)]]


def test_vmapped_function_is_traced_on_one_example(traces):
    fn = torch_function(lambda x: x.sin())
    for batch in (2, 5, 2):
        assert_trees_close(jax.vmap(fn)(jnp.ones((batch, 3))), jnp.sin(jnp.ones((batch, 3))))
    assert traces == [[(3,)]]


@pytest.mark.long
def test_one_wrapped_function_serves_every_shape(traces):
    fn = torch_function(lambda x: torch.cat([x, x]).sum(-1))
    jitted = jax.jit(jax.value_and_grad(lambda x: (fn(x) ** 2).sum()))
    shapes = [(n, m) for n in (1, 3) for m in (0, 2, 4)]
    for _ in range(2):
        for shape in shapes:
            x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
            expected = jax.value_and_grad(lambda x: 2 * (x.sum(-1) ** 2).sum())(x)
            assert_trees_close(jitted(x), expected)
            assert_trees_close(fn(x), jnp.concatenate([x, x]).sum(-1))
    assert traces == [[shape] for shape in shapes]
