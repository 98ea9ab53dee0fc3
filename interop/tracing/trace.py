"""Abstract evaluation: what a torch callable returns and does, learned from a run that computes nothing, if possible.

On fake tensors a callable does what it does for all values, unless it reads some. Then it is run on example values:
whether they decide about shapes shows where several give the same, and a running program watches for what no example
showed (`guard.py`). A failure on fake tensors is no verdict; torch decides, on real ones.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import torch

from ..errors import TorchCallError, quote, signature_text
from ..modes import kernels
from ..modes.device_random import can_draw
from ..modes.fake_run import fake_mode
from ..modes.host_random import drawn_from, host_generators_seeded, refuse_host_draws
from ..modes.known import Failure, KnownConstants
from ..replay.repeated import SMALL
from ..types import Aval, Checkpoints
from .examples import Example
from .observe import Observation, observe
from .outputs import compare, declared
from .traceable import Traceable

Output = tuple[Any, tuple[Any, ...]]
"""The tree and leaves of what a callable returns."""


@dataclass(frozen=True)
class Trace(Observation):
    """What one signature of a callable does, and may do."""

    fakeable: bool = True
    """Whether it does the same for all values: it runs on fake tensors."""
    watched: bool = False
    """Whether a run may do what no observation showed."""
    steady: bool = True
    """Whether it does nothing but ops, which are the same where `reads` are."""
    grad_mode: bool = True
    """Whether it has to run in torch's default grad mode also where nothing is differentiated."""

    def rebuild(self, results: Iterable[Any]) -> tuple[Any, dict[int, Any]]:
        """The callable's output, with arrays in the place of tensors, and the new values of state operands."""
        feed = iter(results)
        leaves = [next(feed) if isinstance(leaf, Aval) else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves), dict(zip(self.state, feed, strict=True))


def trace(
    traced: Traceable, *, out_shape: Any, examples: Callable[[], Iterable[Example]], answers: Sequence[Any] = ()
) -> Trace:
    """Trace a callable: on fake tensors, or else on `examples()`, or by the caller's `out_shape`.

    With `answers`, what it reads of fake tensors is what is said there.
    """
    (found, mode, failure), drawn = drawn_from(lambda: on_fake(traced, answers=answers))
    first = mode.failure
    if found is not None and drawn:
        several = _on_other_numbers(traced, out_shape, _with_draws(traced, found, drawn))
        if several is not None:
            return several
    if found is None or drawn or (first is not None and (first.reads_values or first.makes_shapes)):  # and caught that
        return _on_examples(traced, out_shape, examples(), failure, first)
    if out_shape is not None:
        compare(declared(out_shape), found.output, traced.name)
    grad_mode = True
    if "recurrent" in found.fused_kernels:  # oneDNN's are faster where no gradients are recorded
        grad_mode = not _is_same_without_gradients(traced, found, answers)
    steady = found.checkpoints == "none" and (not found.random or can_draw(traced.device))
    return _traced(found, watched=mode.read_captured, grad_mode=grad_mode, steady=steady)


def _traced(found: Observation, **others: Any) -> Trace:
    return Trace(**{field.name: getattr(found, field.name) for field in fields(found)} | others)


# --- on fake tensors -----------------------------------------------------------------------------


Fake = tuple[Observation | None, KnownConstants, Exception | None]
"""What fake tensors show, their mode, and what was raised."""


def on_fake(traced: Traceable, *, grad_mode: bool = True, answers: Sequence[Any] = ()) -> Fake:
    """Run a callable on fake tensors. What it reads of them is what `answers` say, in their order."""
    with fake_mode(answers) as mode:
        try:
            operands = [torch.empty(shape, dtype=dtype, device=traced.device) for shape, dtype in traced.specs]
            return observe(traced, operands, mode, grad_mode=grad_mode), mode, None
        except TorchCallError:
            raise
        except Exception as exc:
            return None, mode, exc


def _with_draws(traced: Traceable, found: Observation, drawn: frozenset[str]) -> Observation:
    """What was found, with what it draws from beside torch's generators."""
    if drawn and not traced.has_key:
        raise refuse_host_draws(traced.name, drawn, traced.key_remedy)
    return replace(found, host_random=drawn)


def _on_other_numbers(traced: Traceable, out_shape: Any, found: Observation) -> Trace | None:
    """What several runs show of a callable that may do other things for other numbers of Python's and NumPy's; None
    if some of them read values."""
    every = [found]
    for seed in range(_SEEDS):
        with host_generators_seeded((seed,)):
            other, *_ = on_fake(traced)
        if other is None:
            return None
        every.append(other)
    output = found.output if out_shape is None else declared(out_shape)
    if out_shape is None and any(other.output != found.output for other in every):
        raise TorchCallError(
            f"{traced.name} returns other shapes for other numbers of {' and '.join(sorted(found.host_random))}.\nPass "
            "`out_shape=` (a pytree of jax.ShapeDtypeStruct like the output), and return a padded array and a mask."
        )
    return _together(traced, every, output, leaves_torch=False)


_SEEDS = 4


def _is_same_without_gradients(traced: Traceable, found: Observation, answers: Sequence[Any]) -> bool:
    """Whether the callable does the same in torch's no_grad mode, as far as a trace tells."""
    try:
        other, _, _ = on_fake(traced, grad_mode=False, answers=answers)
    except TorchCallError:
        return False
    return other is not None and _apart_from_flops(other) == _apart_from_flops(found)


def _apart_from_flops(found: Observation) -> dict[str, Any]:
    return {
        field.name: getattr(found, field.name) for field in fields(found) if field.compare and field.name != "flops"
    }


# --- on values -----------------------------------------------------------------------------------


def _on_examples(
    traced: Traceable, out_shape: Any, examples: Iterable[Example], failure: Exception | None, first: Failure | None
) -> Trace:
    """What example values show of a callable that fake tensors do not get through: what it raised, and what an op."""
    output = None if out_shape is None else declared(out_shape)
    found, refusals, shown = _observations(traced, examples, failure, output)
    if not found and refusals and (output is None or isinstance(refusals[0], TorchCallError)):
        error = failed(traced, refusals[0])
        raise error from (None if error is refusals[0] else refusals[0])
    if shown is None:
        raise TorchCallError(
            f"{traced.name} {_reason(first)}, so the shapes of its outputs cannot be inferred without values.\n"
            "Pass `out_shape=` (a pytree of jax.ShapeDtypeStruct like the output), or `example_args=` "
            "(arguments to run it on once), or call it once outside jit, grad and vmap."
        ) from failure
    if not found:
        return _anything(traced, shown)
    only_ops = not any(one.random or one.host_random or one.makes_shapes for one in found)
    is_steady = only_ops and _goes_on_with(traced, found[0].reads)
    return _together(traced, found, shown, leaves_torch=_leaves_torch(failure, first), steady=is_steady)


def _goes_on_with(traced: Traceable, reads: Sequence[Any]) -> bool:
    """Whether fake tensors get through the callable once they are told the values that it reads."""
    if not 0 < len(reads) < _MOST_READS:
        return False
    try:
        found, *_ = on_fake(traced, answers=reads)
    except TorchCallError:
        return False
    return found is not None


_MOST_READS = 1000


_CHECKPOINTS: tuple[Checkpoints, ...] = ("none", "kept", "reentrant")


def _together(
    traced: Traceable, found: Sequence[Observation], output: Output, *, leaves_torch: bool, steady: bool = False
) -> Trace:
    """What several runs did, of which another may do other things."""
    state = {i for one in found for i in one.state}
    observed = frozenset().union(*(one.fused_kernels for one in found))
    return Trace(
        *output,
        mutated=frozenset().union(*(one.mutated for one in found)),
        state=tuple(i for i in traced.state_operands if i in state),
        restored=frozenset(),
        fused_kernels=observed | (_any_kernels(traced) - kernels.UNRECORDED),
        flops=max(one.flops for one in found),
        random=traced.has_key,
        captures=True,
        checkpoints=_CHECKPOINTS[max(_CHECKPOINTS.index(one.checkpoints) for one in found)],
        differentiates=any(one.differentiates for one in found),
        precision=min(one.precision for one in found),
        makes_shapes=any(one.makes_shapes for one in found),
        leaves_torch=leaves_torch or any(one.leaves_torch for one in found),
        reads=found[0].reads,
        host_random=frozenset().union(*(one.host_random for one in found)),
        without_autograd=frozenset().union(*(one.without_autograd for one in found)),
        fakeable=False,
        watched=True,
        steady=steady,
    )


def _any_kernels(traced: Traceable) -> frozenset[str]:
    """Those that a run may use which was not seen."""
    return kernels.ALL | ({kernels.DROPPED} if traced.has_key else kernels.NONE)


def _anything(traced: Traceable, output: Output) -> Trace:
    """What a callable may do that was never seen to run."""
    return Trace(
        *output,
        mutated=frozenset(range(len(traced.specs))),
        state=traced.state_operands,
        restored=frozenset(),
        fused_kernels=_any_kernels(traced),
        flops=math.inf,
        random=traced.has_key,
        captures=True,
        checkpoints="none",
        makes_shapes=True,
        leaves_torch=True,
        reads=(),
        fakeable=False,
        watched=True,
        steady=False,
    )


def _observations(
    traced: Traceable, examples: Iterable[Example], failure: Exception | None, output: Output | None
) -> tuple[list[Observation], list[Exception], Output | None]:
    """What runs on examples do, as many as it takes, what they raise, and the output that they show, if they agree.

    Real arguments are one. Of made ones two that give the same are enough, unless shapes are seen to depend on values;
    those that fail tell nothing. Where it matters which state changes for other values, all of them are tried.
    """
    found: list[Observation] = []
    refusals: list[Exception] = []
    is_settled = output is not None
    for example in examples:
        try:
            found.append(_on_values(traced, example))
        except Exception as exc:
            refusals.append(exc)
            is_verdict = example.is_given and (isinstance(exc, TorchCallError) or not is_settled)
            if is_verdict or (failure is not None and quote(exc) == quote(failure)):  # whatever the values are
                break
            continue
        if example.is_given and not is_settled:
            output, is_settled = found[0].output, True
        is_enough = is_settled or (len(found) == 2 and not found[0].makes_shapes)
        if is_enough and not (traced.explores and found[0].flops <= SMALL):
            break
    if not is_settled and found and all(one.output == found[0].output for one in found):
        output = found[0].output
    return found, refusals, output


def _on_values(traced: Traceable, example: Example) -> Observation:
    eager = kernels.plain_kernels(frozenset({kernels.COMPILED}))
    with torch.inference_mode(False), torch.no_grad(), kernels.differentiable_path(), eager:
        found, drawn = drawn_from(lambda: observe(traced, [x.to(traced.device) for x in example.operands()]))
    return _with_draws(traced, found, drawn)


# --- errors --------------------------------------------------------------------------------------


def failed(traced: Traceable, exc: Exception) -> TorchCallError:
    """The error for a callable that torch refuses."""
    if isinstance(exc, TorchCallError):
        return exc
    shown = signature_text([x.name for x in traced.operands], traced.specs)
    hint = _WANTS_BATCH if isinstance(exc, ValueError) and _is_of_batchnorm(exc) else ""
    return TorchCallError(f"{traced.name} failed on operands {shown}.\ntorch said: {quote(exc)}{hint}")


def _is_of_batchnorm(exc: Exception) -> bool:
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(exc.__traceback__)]
    return torch.nn.modules.batchnorm.__file__ in files


_WANTS_BATCH = (
    ". BatchNorm takes the whole batch: call the module outside jax.vmap, and vmap only the JAX parts of the model."
)


def _leaves_torch(failure: Exception | None, first: Failure | None) -> bool:
    """Whether fake tensors show that the callable reads or writes memory past torch's dispatcher."""
    said = f"{failure} {'' if first is None else first.words}"
    return any(words in said for words in _PAST_THE_DISPATCHER)


_PAST_THE_DISPATCHER = (
    ".numpy() is not supported for tensor subclasses",
    "its data is not allocated yet",
    "Cannot access data pointer of Tensor",
    "with unallocated storage",
)


def _reason(failure: Failure | None) -> str:
    """Why fake tensors do not get through a callable whose shapes are not known."""
    if failure is not None and failure.reads_values:
        return f"reads values of its operands ({failure.op}, as `.item()`, `bool(...)` and `.tolist()` do)"
    if failure is not None and failure.makes_shapes:
        return f"makes a tensor whose shape depends on values ({failure.op})"
    return "returns other shapes for other values"
