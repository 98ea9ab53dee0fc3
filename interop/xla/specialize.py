"""A target at one signature: traced as for the other engine, then captured, and made a JAX function."""

import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import torch

from ..errors import ForeignTensorError, TorchCallError, quote
from ..internals import DataDependentOutputException, DynamicOutputShapeException, without_transforms
from ..modes.fake_run import fake_mode
from ..modes.kernels import plain_kernels
from ..modes.known import KnownConstants
from ..tracing.arguments import Arguments
from ..tracing.specialize import trace_of, traceable
from ..tracing.target import Target
from ..tracing.trace import Trace, failed
from ..tracing.traceable import Flat, Traceable
from ..types import Aval, CallOptions, Operand
from ..values import dtypes
from ..values.dtypes import is_inexact_tensor
from ..values.trees import flatten_registering
from .capture import Capture
from .carried import Carrier, Make
from .computed import Computed
from .graph import Graph
from .user_code import heard


def specialize(
    target: Target,
    options: CallOptions,
    arguments: Arguments,
    key: Any,
    device: torch.device,
    *,
    stateful: bool,
    torch_function: Make,
) -> Computed:
    """What a target does with arguments of these shapes and dtypes, as a JAX function.

    **Arguments:**

    - `target`, `options`: what is called, and how.
    - `arguments`: of one call; that of others differ in values.
    - `key`: a JAX PRNG key like the one it is called with; None without.
    - `device`: where torch's tensors are said to be.
    - `stateful`: whether the caller keeps new values of state.
    - `torch_function`: makes a JAX function of a torch function, for ops that torch computes.

    **Raises:** `TypeError` for arguments that do not fit the signature, `torchleaf.TorchCallError` for a target that
    cannot be called, or not by this engine.
    """
    given = traceable(target, arguments, key, device, explores=False)
    traced = given if key is None else given.without_key()
    _refuse_symbols(target.name, traced.operands)
    try:
        found = trace_of(target, given, options.out_shape, tuple)
    except TorchCallError as exc:
        if isinstance(exc.__cause__, ForeignTensorError):
            raise
        raise (_explained(given, exc.__cause__) or exc) from exc.__cause__
    if found.host_random:
        raise TorchCallError(
            f"{target.name} draws from {' and '.join(sorted(found.host_random))}, whose numbers would be the same in "
            "every call of a program of XLA's. Draw them with torch, or use engine='torch'."
        )
    found = replace(target.check(found, stateful=stateful), watched=False)
    run = target.runner(arguments.filler(), found, stateful=stateful)
    graph = _captured(run, traced, found, Carrier(torch_function, target.name, strict=options.strict))
    return Computed(target.name, graph, found, options, len(traced.operands))


_COMPOSED = frozenset({"attention", "recurrent", "linear cross entropy"})
"""Kernels whose parts are captured. The last one computes what it needs for a gradient if it is asked for one."""


def _captured(run: Flat, traced: Traceable, found: Trace, carrier: Carrier) -> Graph:
    with without_transforms(), fake_mode() as mode, plain_kernels(_COMPOSED):
        try:
            return _capture(run, traced, found, mode, carrier)
        except TorchCallError:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as exc:
            raise reading_error(traced.name, exc) from exc
        except Exception as exc:
            raise TorchCallError(
                f"{traced.name} cannot be captured for engine='xla'.\ntorch said: {quote(exc)}"
            ) from exc


def _capture(run: Flat, traced: Traceable, found: Trace, mode: KnownConstants, carrier: Carrier) -> Graph:
    operands = [torch.empty(shape, dtype=dtype, device=traced.device) for shape, dtype in traced.specs]
    for i in traced.trainable if found.differentiates else ():
        operands[i].requires_grad_(is_inexact_tensor(operands[i]))
    avals = [Aval(x.aval.shape, x.aval.dtype) for x in traced.operands]
    capture = Capture(traced.name, operands, avals, mode, carrier)
    with torch.enable_grad(), capture, heard(capture):
        output, state = run(*operands)
    leaves, _ = flatten_registering(output, every_record=True)
    outs = [*(y for y in leaves if isinstance(y, torch.Tensor)), *state]
    return capture.graph(outs)


def _explained(traced: Traceable, cause: BaseException | None) -> TorchCallError | None:
    """The error for a callable that fake tensors do not get through; None if another one says all."""
    if isinstance(cause, DataDependentOutputException | DynamicOutputShapeException):
        return reading_error(traced.name, cause)
    return failed(traced, cause) if isinstance(cause, Exception) else None


def reading_error(name: str, exc: Exception) -> TorchCallError:
    """The error for a callable that reads values, by the line that does."""
    where = line_of(exc)
    what = (
        f"reads values of its operands ({exc})"
        if isinstance(exc, DataDependentOutputException)
        else (f"makes a tensor whose shape depends on values ({exc})")
    )
    return TorchCallError(
        f"{name} {what}{f', in {where}' if where else ''}. XLA compiles one program for all values, so engine='xla' "
        "cannot do that. Compute with the tensor instead (torch.where, a mask), pass the value as a static argument, "
        "or use engine='torch'."
    )


def line_of(exc: BaseException) -> str | None:
    """The innermost line of a user's code among those that led to an exception: `file:line`, and what stands there."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_LIBRARIES) and not f.filename.startswith("<")]
    return f"{own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else None


_PACKAGE = Path(__file__).parents[2]
_TORCH = Path(torch.__file__).parent
_FOLDERS = (
    _TORCH,
    Path(jax.__file__).parent,
    _PACKAGE / "interop",
    _PACKAGE / "layers",
    *(_TORCH.parent / name for name in ("jaxtyping", "beartype", "equinox", "flax")),
)
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in _FOLDERS)


def _refuse_symbols(name: str, operands: Sequence[Operand]) -> None:
    for operand in operands:
        if not all(isinstance(n, int) for n in operand.aval.shape):
            raise TorchCallError(
                f"{name}: argument {operand.name} has the symbolic shape {operand.aval.shape}, and torch is traced "
                "with sizes that are known. Export with sizes that are known, once for each size."
            )
        dtypes.to_torch_dtype(operand.aval.dtype)
