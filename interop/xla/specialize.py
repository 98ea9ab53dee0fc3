"""A target at one signature: traced as for the other engine, then captured, and made a JAX function."""

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ForeignTensorError, TorchCallError, quote
from ..internals.fake import DataDependentOutputException, DynamicOutputShapeException
from ..internals.ops import composites_in_python
from ..internals.transforms import without_transforms
from ..modes.fake_run import fake_mode
from ..modes.host_random import host_generators_kept
from ..modes.kernels import plain_kernels
from ..modes.known import KnownConstants
from ..tracing.arguments import Arguments
from ..tracing.specialize import trace_of, traceable
from ..tracing.target import Target
from ..tracing.trace import Trace, failed, on_fake
from ..tracing.traceable import Flat, Traceable
from ..types import Aval, CallOptions
from ..values.dtypes import is_inexact_tensor
from ..values.trees import flatten_registering
from .capture import Capture
from .carried import Carrier, Make
from .computed import Computed
from .gradient_hooks import HOOKS, REENTRANT, HookSearch
from .graph import Graph
from .lines import line_of
from .same_dtypes import DtypesDiffer
from .user_code import heard
from .value_checks import Assumptions, assumptions

if TYPE_CHECKING:
    from .sizes import Sizes  # which loads more of torch, where it is needed


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
    sizes = _sizes_of(traced)
    found, assumed = _found(target, given, options) if sizes is None else _found_by_example(target, given, sizes)
    if found.host_random:
        raise TorchCallError(
            f"{target.name} draws from {' and '.join(sorted(found.host_random))}, whose numbers would be the same in "
            "every call of a program of XLA's. Draw them with torch, or use engine='torch'."
        )
    found = replace(target.check(found, stateful=stateful), watched=False)
    run = target.runner(arguments.filler(), found, stateful=stateful)
    carrier = Carrier(torch_function, target.name, strict=options.strict, has_sizes=sizes is not None)
    search = HookSearch()
    with search:
        graph = _captured(run, traced, found, carrier, sizes, assumed)
    if search.asked and not search.found:
        _search_with_gradients(search, run, traced, sizes, assumed)
    operands, refusal = [x.name for x in traced.operands], HOOKS if search.found else None
    refusal = REENTRANT if found.checkpoints == "reentrant" else refusal
    return Computed(target.name, graph, found, options, operands, no_derivative=refusal)


def _found(target: Target, given: Traceable, options: CallOptions) -> tuple[Trace, Assumptions]:
    """What a target does, where it raises no error by values."""
    try:
        found = trace_of(target, given, options.out_shape, tuple)
        if found.fakeable:
            return found, Assumptions()
    except TorchCallError as exc:
        if isinstance(exc.__cause__, ForeignTensorError):
            raise
    assumed = _assumptions(given)
    try:
        return trace_of(target, given, options.out_shape, tuple, assumed.answers), assumed
    except TorchCallError as exc:
        raise (_explained(given, exc.__cause__) or exc) from exc.__cause__


def _assumptions(given: Traceable) -> Assumptions:
    with without_transforms(), host_generators_kept():
        return assumptions(lambda answers: on_fake(given, answers=answers))


def _sizes_of(traced: Traceable) -> "Sizes | None":
    """The sizes that are not known, if there are such."""
    shapes = [x.aval.shape for x in traced.operands]
    if all(isinstance(n, int) for shape in shapes for n in shape):
        return None
    from .sizes import Sizes

    return Sizes(traced.name, shapes)


def _found_by_example(target: Target, given: Traceable, sizes: "Sizes") -> tuple[Trace, Assumptions]:
    """What a target does at sizes that are made up: all but shapes is the same at others."""
    operands = [replace(x, aval=Aval(sizes.in_example(x.aval.shape), x.aval.dtype)) for x in given.operands]
    try:
        return _found(target, replace(given, operands=operands), CallOptions())
    except TorchCallError as exc:
        shown = ", ".join(f"{name} = {n}" for name, n in sizes.example.items())
        raise type(exc)(f"{exc}\n(Its symbolic sizes were tried as {shown}.)") from exc.__cause__


_COMPOSED = frozenset({"attention", "recurrent", "linear cross entropy"})
"""Kernels whose parts are captured. The last one computes what it needs for a gradient if it is asked for one."""


def _captured(
    run: Flat, traced: Traceable, found: Trace, carrier: Carrier, sizes: "Sizes | None", assumed: Assumptions
) -> Graph:
    env = None if sizes is None else sizes.env
    with without_transforms(), fake_mode(assumed.answers, env) as mode, plain_kernels(_COMPOSED):
        try:
            with contextlib.nullcontext() if sizes is None else composites_in_python():
                return _capture(run, traced, found, mode, carrier, sizes, assumed)
        except TorchCallError:
            raise
        except DtypesDiffer as exc:
            raise failed(traced, exc) from exc
        except (DataDependentOutputException, DynamicOutputShapeException) as exc:
            raise reading_error(traced.name, exc) from exc
        except Exception as exc:
            remedy = "" if sizes is None else " Export with sizes that are known, once for each size."
            said = f"cannot be captured for engine='xla'{' with symbolic sizes' if sizes else ''}.{remedy}"
            raise TorchCallError(f"{traced.name} {said}\ntorch said: {quote(exc)}") from exc


def _capture(
    run: Flat,
    traced: Traceable,
    found: Trace,
    mode: KnownConstants,
    carrier: Carrier,
    sizes: "Sizes | None",
    assumed: Assumptions,
) -> Graph:
    shapes = [shape if sizes is None else sizes.in_torch(shape) for shape, _ in traced.specs]
    dtypes = [dtype for _, dtype in traced.specs]
    operands = [torch.empty(s, dtype=d, device=traced.device) for s, d in zip(shapes, dtypes, strict=True)]
    for i in traced.trainable if found.differentiates else ():
        operands[i].requires_grad_(is_inexact_tensor(operands[i]))
    avals = [Aval(x.aval.shape, x.aval.dtype) for x in traced.operands]
    capture = Capture(traced.name, operands, avals, mode, carrier, sizes, assumed.errors)
    with torch.enable_grad(), capture, heard(capture):
        output, state = run(*operands)
    leaves, _ = flatten_registering(output, every_record=True)
    if sizes is not None:
        sizes.check(leaves)
    outs = [*(y for y in leaves if isinstance(y, torch.Tensor)), *state]
    return capture.graph(outs)


def _search_with_gradients(
    search: HookSearch, run: Flat, traced: Traceable, sizes: "Sizes | None", assumed: Assumptions
) -> None:
    with without_transforms(), fake_mode(assumed.answers), plain_kernels(_COMPOSED):
        shapes = [shape if sizes is None else sizes.in_example(shape) for shape, _ in traced.specs]
        dtypes = [dtype for _, dtype in traced.specs]
        given = [torch.empty(s, dtype=d, device=traced.device) for s, d in zip(shapes, dtypes, strict=True)]
        search.run_with_gradients(run, given)


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
