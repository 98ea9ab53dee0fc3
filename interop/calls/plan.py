"""Plans: by which means of torch a call is carried out, level by level.

A call is a stack of levels: the user's callable, and around it derivatives and batches. `torch.autograd` and loops over
examples are right whatever the callable does, for they run it as torch itself would. The transforms of `torch.func`
(forward mode, `vmap`, reverse mode inside these) are faster, but run ops by other rules, of which some are missing and
some are wrong. So a plan with such transforms is taken where a fake run shows that torch has the
rules, and where, at the first run, it gives what `torch.autograd` and loops give (`choice.py`, `proof.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..modes.kernels import SCRIPTED
from .reverse import Rows

if TYPE_CHECKING:
    from .call import Computation

Transform = Literal["jvp", "vjp", "vmap"]


@dataclass(frozen=True)
class Plan:
    """By which means the levels of a call are carried out."""

    core: int = 0
    """Levels up to this one are transforms of torch.func; those around them go by torch.autograd and loops."""
    forward: bool = True
    """Whether Jacobian-vector products within the core go by forward mode, rather than by two VJPs."""
    batched: bool = True
    """Whether batches within the core go by `torch.func.vmap`, rather than by loops."""
    real_zeros: bool = False
    """Whether tangents of zeros have memory in forward mode (`zeros.py`)."""
    rows: Rows = "where needed"
    """Whether Jacobian-vector products outside the core go row by row, rather than by two VJPs."""
    audited: bool = False
    """Whether torch.autograd is watched for gradients that cannot be differentiated."""
    differences: int = 0
    """The level whose Jacobian-vector product goes by finite differences, if any."""


CERTAIN = Plan()
"""torch.autograd and loops alone."""


def needs_audit(call: "Computation") -> bool:
    """Whether torch.autograd, if it alone differentiates, has to differentiate gradients of its own."""
    return len(call.derivatives) > 1 or "jvp" in call.derivatives


def is_certain(plan: Plan, call: "Computation") -> bool:
    """Whether a plan is right without a proof: torch.autograd and loops, looked at where they have to be."""
    return not plan.core and (plan.audited or not needs_audit(call))


def candidates(call: "Computation") -> Iterator[Plan]:
    """Plans for a call, the fastest first; the last raises where torch has no derivative."""
    levels = call.levels()
    # TorchScript's optimiser cuts graphs of gradients off, from the second run on, where torch.func differentiates.
    scripted = SCRIPTED in call.base.facts.fused_kernels and len(call.derivatives) > 1
    if call.base.facts.fakeable and not (scripted or call.base.is_loose):
        for i, level in enumerate(levels):
            if level.transform not in ("jvp", "vmap"):
                continue
            yield Plan(level.depth)
            if {x.transform for x in levels[i:]} >= {"jvp", "vmap"}:
                yield (
                    Plan(level.depth, forward=False) if level.transform == "vmap" else Plan(level.depth, batched=False)
                )
    yield CERTAIN
    if needs_audit(call):
        yield replace(CERTAIN, rows="always")
        yield replace(CERTAIN, audited=True)
