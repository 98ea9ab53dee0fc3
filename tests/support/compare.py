"""Comparing pytrees: same structure, dtypes, shapes and values; torch results brought to JAX first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

RUNS = 4
"""The first two runs of a compiled torch call are recorded, those that follow replay it."""


def repeatedly(jit: Callable[..., Any]) -> Callable[..., Any]:
    """`jit`, whose programs run several times, with the same bits each time."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        program = jit(function)

        def run(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
                return program(*args, **kwargs)
            first, *others = [program(*args, **kwargs) for _ in range(RUNS)]
            for result in others:
                assert_same_bits(result, first)
            return others[-1]

        return run

    return compiled


repeated_jit = repeatedly(jax.jit)
eager_and_jit = pytest.mark.parametrize("jit", [lambda f: f, repeated_jit], ids=["eager", "jit"])
"""Runs a test twice, its `jit` once doing nothing and once compiling a program that runs several times."""


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same structure, shapes, dtypes and values; NaNs are equal."""
    assert_trees_close(actual, expected, rtol=0, atol=0)


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure, shapes and dtypes (float0 included), values within tolerance; NaNs and infinities equal.

    Leaves that are not arrays must be equal and of one type. Tolerances apply to the values after widening, so that
    bfloat16 and float8 compare like the rest.
    """
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert actual_tree == expected_tree
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
        _assert_leaves_close(a, e, rtol, atol, f"leaf{jax.tree_util.keystr(path)}")


def _assert_leaves_close(actual: Any, expected: Any, rtol: float, atol: float, name: str) -> None:
    if not _is_array(expected):
        assert type(actual) is type(expected), name
        assert actual == expected, name
        return
    assert _is_array(actual), f"{name}: {type(actual).__name__} instead of an array"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.dtype != jax.dtypes.float0:
        np.testing.assert_allclose(_wide(actual), _wide(expected), rtol=rtol, atol=atol, err_msg=name)


def from_torch(tree: Any) -> Any:
    """The tensors of a pytree as JAX arrays with JAX's dtypes, copied without torchleaf's help."""
    return jax.tree.map(lambda x: _array(x) if isinstance(x, torch.Tensor) else x, tree)


def torch_gradients(loss: Callable[..., torch.Tensor], *args: Any) -> Any:
    """What `jax.grad(loss, argnums=all)` would give for a torch function, through `backward()`.

    `args` are pytrees of JAX or NumPy arrays. Leaves that the loss does not use get zeros. Complex gradients are
    conjugated: torch's convention is the conjugate of JAX's.
    """
    leaves, treedef = jax.tree.flatten(args)
    tensors = [torch.from_numpy(np.array(leaf)).to(torch.get_default_device()).requires_grad_() for leaf in leaves]
    loss(*jax.tree.unflatten(treedef, tensors)).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]
    return jax.tree.unflatten(treedef, [_array(g.conj()) for g in grads])


def _array(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
        return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)
    array = tensor.numpy()
    return jnp.array(array, dtype=jax.dtypes.canonicalize_dtype(array.dtype))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _wide(x: Any) -> np.ndarray:
    array = np.asarray(x)
    native = array.dtype.kind in "biufc" and array.dtype != np.float16
    return array if native else array.astype(np.float64)
