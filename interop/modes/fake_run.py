"""Runs on fake tensors: what shapes come out, and what torch supports, without computing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..internals.compiler import load_compiler
from ..internals.fake import FAKE_LOGGER
from ..internals.switches import VMAP_FALLBACK
from ..internals.transforms import without_transforms
from ..process.switches import flag_off
from ..values import dtypes
from .autocast import neutral
from .kernels import COMPILED, differentiable_path, plain_kernels, without_cudnn
from .known import KnownConstants

_QUIET = flag_off(lambda: not FAKE_LOGGER.disabled, lambda on: setattr(FAKE_LOGGER, "disabled", not on))
"""torch logs a traceback for each failure of a fake run, which torchleaf reports itself."""
_STRICT_VMAP = flag_off(*VMAP_FALLBACK)
"""`torch.func.vmap` fails where it lacks a batching rule, instead of looping over that op with a warning."""


@contextlib.contextmanager
def fake_mode(answers: Sequence[Any] = (), sizes: Any = None) -> Iterator[KnownConstants]:
    """Tensors made inside carry shapes and dtypes but no data, unless they follow from constants (`known.py`)."""
    load_compiler()  # as the first op on fake tensors does, too late for what is to be known of it
    eager = plain_kernels(frozenset({COMPILED}))  # code met here in a mode would never be compiled again
    with (
        _QUIET.held(),
        torch.inference_mode(False),
        KnownConstants(answers, sizes) as mode,
        torch.no_grad(),
        differentiable_path(),
        without_cudnn(),
        # Code that is compiled in a mode may have the mode's tensors for constants, for ever.
        torch.jit.optimized_execution(False),  # pyright: ignore[reportPrivateImportUsage]
        eager,
    ):
        yield mode


def empty_like_avals(avals: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors of the JAX shapes and dtypes `avals`."""
    return tuple(torch.empty(a.shape, dtype=dtypes.to_torch_dtype(a.dtype), device=device) for a in avals)


def fake_run(
    function: Callable[..., Any], avals: Sequence[Any], device: torch.device, answers: Sequence[Any] = ()
) -> Exception | None:
    """Run `function` on fake tensors of a device, which give `answers` where it reads values; the exception it raised,
    if any."""
    try:
        with without_transforms(), neutral(), fake_mode(answers), plain_kernels(), _STRICT_VMAP.held():
            function(*empty_like_avals(avals, device))
    except Exception as exc:
        return exc
    return None
