"""Trial runs on fake tensors: what shapes come out, and what torch supports, without computing."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import dtypes
from .ambient import neutral
from .kernels import COMPILED, differentiable_path, plain_kernels, without_cudnn
from .packed import BatchSizes

_fake_logger = logging.getLogger("torch._subclasses.fake_tensor")


@contextlib.contextmanager
def fake_mode() -> Iterator[None]:
    """Tensors made or met inside carry shapes and dtypes but no data; real constants may be used."""
    was_disabled = _fake_logger.disabled
    _fake_logger.disabled = True  # it logs a traceback for each failure, which we report ourselves
    eager = plain_kernels(frozenset({COMPILED}))  # code met here in a mode would never be compiled again
    try:
        with (
            torch.inference_mode(False),
            _FakeMode(allow_non_fake_inputs=True),
            torch.no_grad(),
            differentiable_path(),
            without_cudnn(),
            eager,
        ):
            yield
    finally:
        _fake_logger.disabled = was_disabled


class _FakeMode(FakeTensorMode):
    """Computes with batch sizes alone for real: modules read their values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, BatchSizes) for x in tensors):
            return super().__torch_dispatch__(func, types, args, kwargs)
        args, kwargs = tree_map_only(BatchSizes, BatchSizes.plain, (args, kwargs or {}))
        if all(isinstance(x, BatchSizes) for x in tensors):
            return tree_map_only(torch.Tensor, BatchSizes.of, func(*args, **kwargs))
        return super().__torch_dispatch__(func, tuple({*types} - {BatchSizes}), args, kwargs)


def empty_like_avals(avals: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors of the JAX shapes and dtypes `avals`."""
    return tuple(torch.empty(a.shape, dtype=dtypes.to_torch_dtype(a.dtype), device=device) for a in avals)


@contextlib.contextmanager
def _without_vmap_fallback() -> Iterator[None]:
    """Make `torch.func.vmap` fail where it lacks a batching rule, instead of looping over that op with a warning."""
    enabled = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(enabled)


def trial_run(function: Callable[..., Any], avals: Sequence[Any], device: torch.device) -> Exception | None:
    """Run `function` on fake tensors of a device; the exception it raised, if any."""
    try:
        with neutral(), fake_mode(), plain_kernels(), _without_vmap_fallback():
            function(*empty_like_avals(avals, device))
    except Exception as exc:
        return exc
    return None
