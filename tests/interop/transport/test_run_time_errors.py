"""What goes wrong only while a compiled program runs reaches the user with torch's words and the callable's name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import TorchCallError, torch_function

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5

AT_RUN_TIME = (RuntimeError, ValueError)
"""What JAX makes of an exception in a program that runs: which one depends on JAX's dispatch path."""


def like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def inspects(x):
    return x * 2 if x.sum().item() > 0 else x


def is_real(x):
    """Whether this is a run, not a trace."""
    return not isinstance(x, FakeTensor)


def linear(x, weight, *, bias=None):
    return torch.nn.functional.linear(x, weight, bias)


# --- exceptions -----------------------------------------------------------------------------------


def factorise(x):
    return torch.linalg.cholesky(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda fn: fn,
        jax.jit,
        lambda fn: jax.jit(lambda x: fn(x + 1) * 2),
        lambda fn: jax.jit(jax.grad(lambda x: fn(x).sum())),
        lambda fn: jax.vmap(fn),
        lambda fn: lambda x: jax.lax.scan(lambda c, _: (fn(c), None), x, length=2),
    ],
    ids=["eager", "jit", "larger program", "grad", "vmap", "scan"],
)
def test_exception_at_run_time(call):
    message = (
        r"(?s)factorise raised _LinAlgError: linalg\.cholesky: .*torch traceback.*test_\w*errors\.py.*in factorise"
    )
    program = call(torch_function(factorise))
    for _ in range(2):
        with pytest.raises(AT_RUN_TIME, match=message):
            jax.block_until_ready(program(-jnp.ones((2, 2, 2))))


def test_wrong_dtype_at_run_time():
    """Fake tensors let some mixtures of dtypes pass."""
    message = r"(?s)linear raised RuntimeError: .*dtype.*x: float32\[2, 3\], weight: float16\[2, 3\]"
    with pytest.raises(AT_RUN_TIME, match=message):
        torch_function(linear)(X, X.astype(jnp.float16))


def test_the_process_goes_on_after_an_exception():
    fn = torch_function(lambda x: x * 2 if (x > 0).all() else 1 / 0, out_shape=like(2, 3))
    program = jax.jit(fn)
    for _ in range(3):
        assert_trees_close(program(X + 1), 2 * (X + 1))
        with pytest.raises(AT_RUN_TIME, match="ZeroDivisionError"):
            jax.block_until_ready(program(X - 1))


def test_exception_with_text_that_is_hard_to_carry():
    def fail(x):
        if is_real(x):
            raise ValueError("50% of {x} ≠ \n 'quoted' \"text\"")
        return x

    with pytest.raises(AT_RUN_TIME, match=r"50% of \{x\} ≠ \n 'quoted' \"text\""):
        torch_function(fail)(X)


# --- outputs that change with the values ----------------------------------------------------------


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


# --- outputs that out_shape does not declare ------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "out_shape", "message"),
    [
        (inspects, like(3, 3), r"inspects: output 0 has shape \(2, 3\) at run time, but \(3, 3\).*out_shape.*padded"),
        (
            inspects,
            like(2, 3, dtype=jnp.int32),
            r"inspects returned at output a tensor of dtype torch\.float32, but int32",
        ),
        (
            inspects,
            (like(2, 3),),
            r"inspects returned PyTreeDef\(\*\) at run time, but PyTreeDef\(\(\*,\)\).*out_shape",
        ),
        (
            lambda x: (inspects(x), 3),
            (like(2, 3), like()),
            r"lambda.* returned at output\[1\] a int \(3\); expected a tensor",
        ),
    ],
    ids=["shape", "dtype", "structure", "static"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_out_shape_that_contradicts_the_run(fn, out_shape, message, jit):
    call = torch_function(fn, out_shape=out_shape)
    with pytest.raises(AT_RUN_TIME, match=message):
        jax.block_until_ready((jax.jit(call) if jit else call)(X))


# --- tensors that escape --------------------------------------------------------------------------

KEPT = []


@pytest.fixture
def kept():
    yield KEPT
    KEPT.clear()


def keeps(x, y):
    KEPT.append(y)
    return x + y


def keeps_a_view(x, y):
    KEPT.append({"a": y.T[0]})
    return x + y


def keeps_when_real(x, y):
    if is_real(x):
        KEPT.append(y)
    return x + y


def keeps_a_view_when_real(x, y):
    if is_real(x):
        KEPT.append({"a": y[0]})
    return x + y


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("fn", [keeps, keeps_a_view])
def test_tensor_that_escapes(fn, jit, kept):
    with pytest.raises(
        TorchCallError, match=rf"{fn.__name__} keeps argument y .*Return the tensor.*`tensor\.clone\(\)`"
    ):
        (jax.jit if jit else lambda f: f)(torch_function(fn))(X, X)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("fn", [keeps_when_real, keeps_a_view_when_real])
def test_tensor_that_escapes_at_run_time_only(fn, jit, kept):
    with pytest.raises(AT_RUN_TIME, match=rf"{fn.__name__} keeps (argument )?y .*`tensor\.clone\(\)`"):
        jax.block_until_ready((jax.jit if jit else lambda f: f)(torch_function(fn))(X, X + 1))


def test_copies_may_be_kept(kept):
    def keep_copies(x):
        KEPT.append((x.clone(), x.sum(), x.shape))
        return x * 2

    assert_trees_close(torch_function(keep_copies)(X), 2 * X)
    copied, total, _ = kept[-1]
    np.testing.assert_array_equal(copied, X)
    np.testing.assert_allclose(total, X.sum(), rtol=1e-6)


@pytest.mark.long
def test_reference_cycles_are_no_escapes():
    def cyclic(x):
        cell = [x]
        cell.append(cell)
        return x + 1

    assert_trees_close(jax.jit(torch_function(cyclic))(X), X + 1)
