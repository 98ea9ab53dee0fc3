"""Where a `torch_function` that inspects values gets its output shapes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch
from samples import as_torch
from torchleaf import TorchCallError, torch_function
from transformers.utils import ModelOutput

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# --- functions that inspect values ----------------------------------------------------------------


def inspects(x):
    """The code path depends on the values."""
    return x * 2 if x.sum().item() > 0 else x.exp()


def inspects_in_jax(x):
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
    fn = shaped(how, inspects, X, output=like(2, 3))
    for x in (X, X - 1, X + 1):
        assert_trees_close(jit(fn)(x), inspects_in_jax(x))
        assert_trees_close(jit(jax.grad(lambda x: fn(x).sum()))(x), jax.grad(lambda x: inspects_in_jax(x).sum())(x))
        assert_trees_close(jit(lambda x: jax.jvp(fn, (x,), (x,)))(x), jax.jvp(inspects_in_jax, (x,), (x,)))


@ways
def test_image_tokens(how):
    ids, embedded, features = jnp.array([1, 7, 2, 7]), jnp.zeros((4, 3)), jnp.arange(6.0).reshape(2, 3)
    fn = jax.jit(shaped(how, replace_tokens, ids, embedded, features, output=like(4, 3)))
    assert_trees_close(fn(ids, embedded, features), embedded.at[jnp.array([1, 3])].set(features))
    assert_trees_close(fn(ids[::-1], embedded, features), embedded.at[jnp.array([0, 2])].set(features))
    with pytest.raises((RuntimeError, ValueError), match="replace_tokens raised ValueError: 1 image tokens for 2"):
        jax.block_until_ready(fn(ids.at[1].set(0), embedded, features))


def test_a_run_of_the_same_signature_is_enough():
    fn = torch_function(lambda x: x[x > 0])
    with pytest.raises(TorchCallError, match="out_shape"):
        jax.jit(fn)(X)
    fn(X)
    assert_trees_close(jax.jit(fn)(X + 0.1), (X + 0.1)[X + 0.1 > 0])
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


# --- out_shape and example_args -------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize(
    ("fn", "out_shape"),
    [
        (torch.sin, like(2, 3)),
        (torch.sin, X),
        (lambda x: {"a": (x, None), "b": x.sum()}, {"a": (like(2, 3), None), "b": like()}),
        (lambda x: x.double(), like(2, 3, dtype=jnp.float32)),
        (lambda x: inspects(x).double(), like(2, 3, dtype=jnp.float32)),
        (lambda x: (inspects(x), x.argmax()), (like(2, 3), like(dtype=jnp.int32))),
    ],
    ids=["struct", "array", "tree", "canonical", "canonical at run time", "integers"],
)
def test_out_shape_that_fits(fn, out_shape, jit):
    assert_trees_close(jit(torch_function(fn, out_shape=out_shape))(X), from_torch(fn(as_torch(X))))


def test_out_shape_in_64_bits(x64):
    fn = torch_function(
        lambda x: (inspects(x), x.argmax()), out_shape=(like(3, dtype=jnp.float64), like(dtype=jnp.int64))
    )
    x = jnp.arange(3.0)
    assert_trees_close(jax.jit(fn)(x), (inspects_in_jax(x), jnp.argmax(x)))


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
    fn = torch_function(inspects, example_args=(X,))
    assert_trees_close(fn(X[:1]), inspects_in_jax(X[:1]))  # not traced: its own values serve
    with pytest.raises(
        TorchCallError, match=r"inspects is called with \(float32\[1, 2\]\).*example_args are \(float32\[2, 3\]\)"
    ):
        jax.jit(fn)(X[:1, :2])


# --- what they cannot be --------------------------------------------------------------------------

REMEDY = r"[\s\S]*`out_shape=`.*`example_args=`.*outside jit, grad and vmap"


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (torch.nonzero, r"nonzero makes a tensor whose shape depends on values \(aten\.nonzero"),
        (lambda x: x[x > 0], r"lambda.* makes a tensor whose shape depends on values \(aten\."),
        (lambda x: torch.unique(x.round()), r"lambda.* makes a tensor whose shape depends on values \(aten\._unique2"),
        (
            lambda x: torch.bincount((9 * x.flatten()).abs().long()),
            r"lambda.*bincount.*so the shapes of its outputs cannot be inferred",
        ),
        (
            lambda x: x.new_ones(99_999)[: int((999 * x.sum()).abs().item())],
            r"lambda.* reads values of its operands \(aten\._local_scalar",
        ),
        (lambda x: x.new_zeros(int(999 * x.max().exp()) + 1), r"lambda.* reads values of its operands"),
        (lambda x: x.masked_select(x > 0), r"lambda.* makes a tensor whose shape depends on values"),
    ],
    ids=["nonzero", "mask", "unique", "bincount", "slice", "size", "masked_select"],
)
@pytest.mark.parametrize(
    "transform", [jax.jit, lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap], ids=["jit", "grad", "vmap"]
)
def test_no_shapes_without_values(fn, message, transform):
    """Where values decide about shapes, the caller has to say them."""
    with pytest.raises(TorchCallError, match=message + REMEDY):
        transform(torch_function(fn))(X)


@pytest.mark.parametrize(
    ("fn", "out_shape", "message"),
    [
        (torch.relu, like(3, 3), r"relu: out_shape says float32\[3, 3\].*returns float32\[2, 3\].*Correct out_shape"),
        (torch.relu, like(2, 3, dtype=jnp.int32), r"relu: out_shape says int32\[2, 3\].*returns float32\[2, 3\]"),
        (torch.relu, (like(2, 3),), r"relu: out_shape says .*float32\[2, 3\].*returns float32\[2, 3\]"),
        (lambda x: (x, "a"), (like(2, 3), like()), r"lambda.*: out_shape says .*returns .*'a'"),
    ],
    ids=["shape", "dtype", "structure", "static"],
)
def test_out_shape_that_contradicts_the_trace(fn, out_shape, message):
    with pytest.raises(TorchCallError, match=message):
        torch_function(fn, out_shape=out_shape)(X)


def test_out_shape_must_hold_shapes():
    with pytest.raises(TypeError, match=r"out_shape has a int leaf \(2\); give a pytree of jax\.ShapeDtypeStruct"):
        torch_function(torch.relu, out_shape=(2, 3))(X)


def test_examples_that_fail():
    def picky(x):
        if x.sum().item() <= 0:
            raise ValueError("not positive")
        return x

    with pytest.raises(TorchCallError, match=r"(?s)picky failed on operands.*torch said: ValueError: not positive"):
        torch_function(picky)(X - 1)


@pytest.mark.parametrize("example", [(), (X, X)], ids=["too few", "too many"])
def test_wrong_number_of_example_args(example):
    with pytest.raises((TorchCallError, TypeError), match=r"inspects .*example_args"):
        jax.jit(torch_function(inspects, example_args=example))(X)
