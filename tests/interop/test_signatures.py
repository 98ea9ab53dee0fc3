"""One trace for each signature of a `torch_function`, and where it gets its output shapes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf.interop.function as function_module
from compare import assert_trees_close, eager_and_jit
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import TorchCallError, torch_function
from transformers.utils import ModelOutput

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# --- one trace per signature ---------------------------------------------------------------------


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
    fn = torch_function(counter)
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
    original = function_module.trace

    def counting(function: Callable[..., Any], specs: Any, **options: Any) -> Any:
        shapes.append([shape for shape, _ in specs])
        return original(function, specs, **options)

    monkeypatch.setattr(function_module, "trace", counting)
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


# --- functions that inspect values ---------------------------------------------------------------


def leaky(x):
    """The code path depends on the values."""
    return x * 2 if x.sum().item() > 0 else x.exp()


def leaky_in_jax(x):
    return jnp.where(x.sum() > 0, x * 2, jnp.exp(x))


def replace_tokens(ids, embedded, features):
    """What multimodal transformers do with image tokens."""
    token = 7
    if (ids == token).sum() != features.shape[0]:
        raise ValueError(f"{int((ids == token).sum())} image tokens for {features.shape[0]} features")
    return embedded.masked_scatter((ids == token)[:, None], features)


def shaped(how: str, fn: Callable[..., Any], *args: Any, output: Any) -> Callable[..., Any]:
    """`torch_function(fn)` that knows its output shapes by one of three ways."""
    if how == "out_shape":
        return torch_function(fn, out_shape=output)
    if how == "example_args":
        return torch_function(fn, example_args=args)
    wrapped = torch_function(fn)
    wrapped(*args)
    return wrapped


ways = pytest.mark.parametrize("how", ["out_shape", "example_args", "called once"])


@ways
@eager_and_jit
def test_inspecting_function(how, jit):
    fn = shaped(how, leaky, X, output=like(2, 3))
    for x in (X, X - 1, X + 1):
        assert_trees_close(jit(fn)(x), leaky_in_jax(x))
        assert_trees_close(jit(jax.grad(lambda x: fn(x).sum()))(x), jax.grad(lambda x: leaky_in_jax(x).sum())(x))
        assert_trees_close(jit(lambda x: jax.jvp(fn, (x,), (x,)))(x), jax.jvp(leaky_in_jax, (x,), (x,)))


@ways
def test_image_tokens(how):
    ids, embedded, features = jnp.array([1, 7, 2, 7]), jnp.zeros((4, 3)), jnp.arange(6.0).reshape(2, 3)
    fn = jax.jit(shaped(how, replace_tokens, ids, embedded, features, output=like(4, 3)))
    assert_trees_close(fn(ids, embedded, features), embedded.at[jnp.array([1, 3])].set(features))
    assert_trees_close(fn(ids[::-1], embedded, features), embedded.at[jnp.array([0, 2])].set(features))
    with pytest.raises((RuntimeError, ValueError), match="replace_tokens raised ValueError: 1 image tokens for 2"):
        jax.block_until_ready(fn(ids.at[1].set(0), embedded, features))


def test_a_run_of_the_same_signature_is_enough(traces):
    fn = torch_function(leaky)
    with pytest.raises(TorchCallError, match="out_shape"):
        jax.jit(fn)(X)
    fn(X)
    assert_trees_close(jax.jit(fn)(X - 1), leaky_in_jax(X - 1))
    assert traces == [[(2, 3)]] * 2
    with pytest.raises(TorchCallError, match="out_shape"):
        jax.jit(fn)(X[:1])


@eager_and_jit
def test_function_that_leaves_torch_needs_no_shapes(jit):
    """NumPy code cannot run on fake tensors, but zeros tell the shapes."""
    fn = torch_function(lambda x: torch.from_numpy(np.sort(x.numpy(), axis=0)))
    assert_trees_close(jit(fn)(-X), jnp.sort(-X, axis=0))


@dataclass
class Detections(ModelOutput):
    boxes: Any = None
    count: Any = None


def detect(x, size=4):
    kept = x[x > 0]
    return Detections(boxes=torch.nn.functional.pad(kept, (0, size - len(kept))), count=torch.tensor(len(kept)))


def test_padded_output_of_data_dependent_shape():
    shapes = Detections(boxes=like(4), count=like(dtype=jnp.int32))
    fn = jax.jit(torch_function(detect, out_shape=shapes))
    for x in (jnp.array([1.0, -1, 2, -2]), jnp.array([-1.0, -1, -2, 5])):
        got = fn(x)
        assert isinstance(got, Detections)
        kept = np.asarray(x[x > 0])
        assert_trees_close(got.boxes, jnp.pad(kept, (0, 4 - len(kept))))
        assert_trees_close(got.count, jnp.array(len(kept)))


# --- out_shape and example_args ------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize(
    ("fn", "out_shape"),
    [
        (torch.sin, like(2, 3)),
        (torch.sin, X),
        (lambda x: {"a": (x, None), "b": x.sum()}, {"a": (like(2, 3), None), "b": like()}),
        (lambda x: x.double(), like(2, 3, dtype=jnp.float32)),
        (lambda x: leaky(x).double(), like(2, 3, dtype=jnp.float32)),
        (lambda x: (leaky(x), x.argmax()), (like(2, 3), like(dtype=jnp.int32))),
    ],
    ids=["struct", "array", "tree", "canonical", "canonical at run time", "integers"],
)
def test_out_shape_that_fits(fn, out_shape, jit):
    assert_trees_close(jit(torch_function(fn, out_shape=out_shape))(X), jit(lambda x: torch_function(fn)(X))(X))


def test_out_shape_in_64_bits(x64):
    fn = torch_function(lambda x: (leaky(x), x.argmax()), out_shape=(like(3, dtype=jnp.float64), like(dtype=jnp.int64)))
    x = jnp.arange(3.0)
    assert_trees_close(jax.jit(fn)(x), (leaky_in_jax(x), jnp.argmax(x)))


def test_example_args_are_not_changed():
    example = np.ones(3, np.float32)
    fn = torch_function(lambda x: x.mul_(x.sum().item()), example_args=(example,))
    assert_trees_close(jax.jit(fn)(jnp.full(3, 2.0)), jnp.full(3, 12.0))
    np.testing.assert_array_equal(example, np.ones(3))


def test_example_args_may_be_pytrees_with_statics():
    def pick(batch, mode):
        assert mode == "double"
        return {"y": batch["x"] * 2 if batch["flag"].item() else batch["x"]}

    fn = torch_function(pick, example_args=({"x": X, "flag": np.array(True)}, "double"))
    got = jax.jit(lambda batch: fn(batch, "double"))({"x": X + 1, "flag": jnp.array(False)})
    assert_trees_close(got, {"y": X + 1})


def test_arguments_of_another_shape_than_example_args():
    fn = torch_function(leaky, example_args=(X,))
    assert_trees_close(fn(X[:1]), leaky_in_jax(X[:1]))  # not traced: its own values serve
    with pytest.raises(
        TorchCallError, match=r"leaky is called with \(float32\[1, 2\]\).*example_args are \(float32\[2, 3\]\)"
    ):
        jax.jit(fn)(X[:1, :2])


# --- outputs that change with the values ---------------------------------------------------------


def changing_static(x):
    return x, float(x.sum())


def changing_structure(x):
    return (x, x) if x.sum() > 0 else (x,)


def changing_dtype(x):
    return x if x.sum() > 0 else x.half()


def changing_shape(x):
    return x[x > 0]


def changing_kind(x):
    return x if x.sum() > 0 else 3


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (changing_static, r"changing_static returned at output\[1\] -2\.0, but 6\.0 when it was traced"),
        (
            changing_structure,
            r"changing_structure returned PyTreeDef\(\(\*,\)\) at run time, but.*\(\(\*, \*\)\)",
        ),
        (changing_dtype, r"changing_dtype returned at output a tensor of dtype torch\.float16, but float32"),
        (changing_shape, r"changing_shape: output 0 has shape \(1,\) at run time, but \(3,\)"),
        (changing_kind, r"changing_kind returned at output a int \(3\); expected a tensor"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_output_that_changes_with_values_is_an_error(fn, message, jit):
    wrapped = torch_function(fn)
    first, second = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0, -2.0])
    wrapped(first)
    with pytest.raises((RuntimeError, ValueError), match=message):
        jax.block_until_ready((jax.jit(lambda x: wrapped(x)[0]) if jit else wrapped)(second))


def test_the_same_static_again_is_no_error():
    wrapped = torch_function(changing_static)
    x = jnp.array([1.0, 2.0, 3.0])
    assert wrapped(x)[1] == wrapped(x[::-1])[1] == 6.0
    assert np.isnan(torch_function(changing_static)(x * jnp.nan)[1])
