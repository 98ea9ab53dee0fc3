"""Trial runs on fake tensors: what shapes come out, and what torch supports, without computing."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from ..values import dtypes
from .ambient import neutral
from .kernels import COMPILED, differentiable_path, plain_kernels, without_cudnn
from .known import KnownConstants

_fake_logger = logging.getLogger("torch._subclasses.fake_tensor")


@contextlib.contextmanager
def fake_mode(answers: Sequence[Any] = ()) -> Iterator[KnownConstants]:
    """Tensors made inside carry shapes and dtypes but no data, unless they follow from constants (`known.py`)."""
    was_disabled = _fake_logger.disabled
    _fake_logger.disabled = True  # it logs a traceback for each failure, which we report ourselves
    import torch._dynamo  # as the first op on fake tensors does, too late for what is to be known of it

    eager = plain_kernels(frozenset({COMPILED}))  # code met here in a mode would never be compiled again
    try:
        with (
            torch.inference_mode(False),
            KnownConstants(answers) as mode,
            torch.no_grad(),
            differentiable_path(),
            without_cudnn(),
            # Code that is compiled in a mode may have the mode's tensors for constants, for ever.
            torch.jit.optimized_execution(False),  # pyright: ignore[reportPrivateImportUsage]
            eager,
        ):
            yield mode
    finally:
        _fake_logger.disabled = was_disabled


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


def trial_run(
    function: Callable[..., Any], avals: Sequence[Any], device: torch.device, answers: Sequence[Any] = ()
) -> Exception | None:
    """Run `function` on fake tensors of a device, which give `answers` where it reads values; the exception it raised,
    if any."""
    try:
        with neutral(), fake_mode(answers), plain_kernels(), _without_vmap_fallback():
            function(*empty_like_avals(avals, device))
    except Exception as exc:
        return exc
    return None
