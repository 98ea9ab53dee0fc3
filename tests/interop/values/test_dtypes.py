"""dtypes of operands and results of a `torch_function`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch
from samples import NARROW, as_torch, dtype_id, raw_bytes, sample
from torch.nn import functional as F
from torchleaf import to_jax, torch_function

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def _look(x):
    return x, str(x.dtype)


@pytest.mark.parametrize("numpy", [False, True], ids=["jax", "numpy"])
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_operand_dtype(dtype, numpy):
    array = to_jax(sample(dtype), copy=True)
    got, arrived = torch_function(_look)(np.asarray(array) if numpy else array)
    assert arrived == ("torch.int64" if dtype == torch.int32 else str(dtype))  # JAX's default integer is torch's
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert raw_bytes(got) == raw_bytes(array)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64", "float64", "complex128"])
def test_operand_dtype_under_x64(dtype, x64):
    got, arrived = torch_function(_look)(jnp.arange(3, dtype=dtype))
    assert (got.dtype, arrived) == (jnp.dtype(dtype), f"torch.{dtype}")


def test_x64_is_part_of_the_signature():
    look = torch_function(_look)
    x = np.arange(3.0)
    assert look(x)[1] == "torch.float32"
    with jax.enable_x64(True):
        assert look(x)[1] == "torch.float64"
    assert look(x)[1] == "torch.float32"


@pytest.mark.parametrize(
    ("dtype", "canonical"), [("float64", "float32"), ("int64", "int32"), ("complex128", "complex64")]
)
def test_wide_outputs_are_canonicalised(dtype, canonical):
    widen = torch_function(lambda x: x.to(getattr(torch, dtype)))
    assert_trees_close(widen(X), X.astype(canonical))
    with jax.enable_x64(True):
        assert_trees_close(widen(X), X.astype(dtype))


def test_mixed_dtypes_in_one_call():
    def mix(half, brain, index, mask, z, byte):
        return {
            "sum": half.float() + brain.float(),
            "taken": half[index],
            "where": torch.where(mask, z, 0),
            "byte": byte + 1,
            "any": mask.any(),
        }

    half, brain = jnp.arange(3, dtype=jnp.float16), jnp.arange(3, dtype=jnp.bfloat16)
    index, mask = jnp.array([2, 0]), jnp.array([True, False, True])
    z, byte = jnp.arange(3) * (1 + 2j), jnp.array([255, 1], jnp.uint8)
    got = jax.jit(torch_function(mix))(half, brain, index, mask, z, byte)
    expected = {
        "sum": 2 * jnp.arange(3.0),
        "taken": half[index],
        "where": jnp.where(mask, z, 0),
        "byte": byte + 1,
        "any": jnp.array(True),
    }
    assert_trees_close(got, expected)


def test_int32_labels_arrive_as_long():
    logits, labels = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32), jnp.array([0, 4, 2, 2])
    assert labels.dtype == jnp.int32

    def expected(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    cross_entropy = torch_function(F.cross_entropy)
    assert_trees_close(cross_entropy(logits, labels), expected(logits))
    assert_trees_close(jax.jit(jax.grad(cross_entropy))(logits, labels), jax.grad(expected)(logits))


@pytest.mark.long
@eager_and_jit
def test_autocast_inside(jit):
    def product(a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return a @ b, a + b.mT

    a, b = as_torch(X), as_torch(X.T)
    assert_trees_close(jit(torch_function(product))(X, X.T), from_torch(product(a, b)))
    assert_trees_close(jit(torch_function(product))(X, X.T)[0].dtype, jnp.dtype(jnp.bfloat16))
