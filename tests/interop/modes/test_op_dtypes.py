"""The dtypes of results are those torch gives, canonicalised as JAX does: of ops on each dtype, and on pairs."""

import itertools
import operator

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch
from samples import dtype_id, sample
from torchleaf import TorchCallError, to_jax, torch_function

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,  # JAX's int32, or int64 under x64
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
)
WIDE = (torch.int32, torch.uint32, torch.int64, torch.float64, torch.complex128)

OPS = {
    "x + 1": lambda x: x + 1,
    "x + 1.0": lambda x: x + 1.0,
    "x + 1j": lambda x: x.float() + 1j if x.dtype == torch.float16 else x + 1j,  # JAX has no complex32
    "x / 2": lambda x: x / 2,
    "x // 2": lambda x: x // 2,
    "x % 3": lambda x: x % 3,
    "-x": operator.neg,
    "~x": operator.invert,
    "x & 1": lambda x: x & 1,
    "x > 0": lambda x: x > 0,
    "x == x.T": lambda x: x == x.mT.mT,
    "abs": torch.abs,
    "sign": torch.sign,
    "square": torch.square,
    "exp": torch.exp,
    "sqrt": lambda x: torch.sqrt(torch.abs(x)),
    "isfinite": torch.isfinite,
    "sum": torch.sum,
    "sum over an axis": lambda x: x.sum(0),
    "prod": lambda x: torch.prod(x.flatten()[:3]),  # all of them do not fit 32 bits
    "mean": torch.mean,
    "std": torch.std,
    "max": lambda x: x.max(0),
    "argmax": torch.argmax,
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: torch.sort(x.flatten(), stable=True),
    "nonzero count": torch.count_nonzero,
    "any": torch.any,
    "matmul": lambda x: x @ x.mT,
    "softmax": lambda x: torch.softmax(x, 0),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.long().clamp(0), 60),
    "gather": lambda x: torch.arange(60)[x.clamp(0)],
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "full of 1": lambda x: x.new_full((2,), 1),
    "arange": lambda x: torch.arange(3) + x.flatten()[:3],
    "to float": lambda x: x.float(),
    "to double": lambda x: x.double(),
    "to long": lambda x: x.long(),
    "to bool": lambda x: x.bool(),
    "view as bytes": lambda x: x.contiguous().view(torch.uint8),
    "real": lambda x: x.real,
    "fft": lambda x: torch.fft.fft(x),
}

pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values to real discards:UserWarning")


def check(op, *tensors):
    """Same values and dtypes as torch, or an error where torch has one."""
    arrays, function, refused = [to_jax(x, copy=True) for x in tensors], torch_function(op), False
    try:
        expected = op(*tensors)
    except (RuntimeError, IndexError, TypeError):  # NotImplementedError is a RuntimeError
        refused = True
    if refused:
        with pytest.raises((TorchCallError, jax.errors.JaxRuntimeError), match=r"torch said|The torch traceback"):
            jax.block_until_ready(function(*arrays))
        return
    actual = function(*arrays)
    assert_trees_close(jax.tree.leaves(actual), jax.tree.leaves(from_torch(expected)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op(op, dtype):
    check(op, sample(dtype))


@pytest.mark.parametrize("dtype", WIDE, ids=dtype_id)
@pytest.mark.parametrize("op", [OPS[name] for name in ("x + 1", "x / 2", "sum", "to long", "to float", "abs")])
def test_op_under_x64(op, dtype, x64):
    check(op, sample(dtype))


# A half and a complex scalar would make complex32, which JAX does not have.
PAIRS = [pair for pair in itertools.combinations(DTYPES, 2) if pair != (torch.float16, torch.complex64)]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=dtype_id)
def test_promotion(first, second):
    """Of tensors, of a tensor and a scalar tensor, both ways."""

    def add(x, y):
        return x + y, x * y[0, 0], x[0, 0] * y

    check(add, sample(first), sample(second))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex], ids=dtype_id)
@pytest.mark.parametrize(
    "op", [torch.sum, torch.mean, lambda x: (x * 2.0).sum(), lambda x: x.to(torch.complex64).abs()]
)
def test_gradients_have_the_dtype_of_their_argument(op, dtype):
    array = to_jax(sample(dtype), copy=True)
    function = torch_function(op)

    def loss(x):
        return jnp.real(function(x)).astype(jnp.float32).sum()

    (tensor,) = [sample(dtype).requires_grad_()]
    (expected,) = torch.autograd.grad(op(tensor).real.float().sum(), tensor)
    assert expected.dtype == dtype
    assert_trees_close(jax.jit(jax.grad(loss))(array), from_torch(expected.conj()), rtol=1e-2)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_results_of_a_dtype_that_jax_lacks():
    with pytest.raises(TorchCallError, match=r"torch.complex32 has no JAX counterpart"):
        torch_function(lambda x: x.to(torch.complex32))(jnp.ones(3))
