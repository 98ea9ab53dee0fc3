"""Why a check that is right runs slower than it could: what the library warns of, and how its calls ran."""

from collections.abc import Iterable, Iterator, Sequence
from warnings import WarningMessage

from ...interop.calls.call import TorchCall
from ...interop.calls.execution import Planned
from .jax_side import Ours

_OURS = ("vmap of ", "torchleaf")
"""How the library's own warnings begin, or what they contain."""


def remarks(made: Iterable[Ours], caught: Iterable[WarningMessage]) -> list[str]:
    """What to say of the calls of a check, each once."""
    said = [str(warning.message) for warning in caught]
    warned = [text for text in said if text.startswith(_OURS[0]) or _OURS[1] in text]
    functions = [function for ours in made for function in ours.wrapped.functions()]
    calls = [call for function in functions for call in function.calls()]
    carried = [_carried(function.name, ops) for function in functions if (ops := function.carried())]
    return list(dict.fromkeys([*warned, *_of_calls(calls), *carried]))


def _carried(name: str, ops: Sequence[str]) -> str:
    return (
        f"{name}: torch computes {', '.join(ops)} within XLA's program, which can therefore not be exported, nor run "
        "where torch cannot: engine='xla' has no JAX function for them."
    )


def _of_calls(calls: Iterable[TorchCall]) -> Iterator[str]:
    for call in calls:
        execution = call.execution
        if execution.recomputes:
            yield f"{call.base.name}: its autograd graph cannot be kept, so the backward pass runs the forward again."
        if not isinstance(execution, Planned) or not execution.choice.is_prepared:
            continue
        choice = execution.choice
        if "jvp" in execution.computation.derivatives and choice.is_final and not choice.plan.core and choice.reasons:
            reason = choice.reasons[-1][1].split("\n")[0]
            yield f"{call.base.name}: forward mode goes by torch.autograd, not by torch.func ({reason})."
        unrepeated = execution.why_unrepeated()
        if unrepeated is not None:
            yield f"{call.base.name}: compiled programs run Python in each call: {unrepeated}."
