"""How a call is carried out: by which plan, with which of torch's kernels, and as a recording once it is known.

What is decided here is decided at the latest at the first run, on its operands; calls themselves do not change.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch

from ..errors import quote
from ..modes.autocast import neutral
from ..modes.kernels import FUSED, NONE, chosen, lacking_derivatives, refuse_scripted
from ..replay.repeated import LARGE, LARGE_ON_GPU, Repeated
from ..types import Tensors
from ..wording import says_no_evaluation_backward, says_vmap_cannot
from . import scope
from .call import Computation, TorchCall
from .choice import Choice
from .plan import Plan


class Execution(ABC):
    """Carries out one call, outermost, under `torch.no_grad()`."""

    def __init__(self, call: TorchCall):
        self.call = call
        self._repeated: dict[torch.device, Repeated] = {}

    @property
    @abstractmethod
    def plain_kernels(self) -> frozenset[str]:
        """The fused kernels that the call has to do without, since it asks torch for rules that they lack."""

    @property
    def recomputes(self) -> bool:
        """Whether a graph that was to be kept cannot be, so that backward calls run the forward again."""
        return False

    @abstractmethod
    def prepare(self) -> None:
        """Decide how to run, before the first run."""

    @abstractmethod
    def execute(self, *tensors: torch.Tensor) -> Tensors:
        """Compute."""

    @abstractmethod
    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        """`execute`, for one of many runs."""

    @abstractmethod
    def replay(self, operands: Tensors, results: Tensors) -> bool:
        """Write into `results` what earlier runs give on these operands; False where they cannot tell."""

    def forget(self, results: Tensors) -> None:
        """Give up what a run kept for later calls, which holds operands: the next ones keep nothing, as most do."""
        return

    @property
    @abstractmethod
    def recordable(self) -> bool:
        """Whether the ops of the call do not depend on values, so far as is known."""

    @cached_property
    def is_repeatable(self) -> bool:
        """Whether the call may be recorded."""
        large = LARGE_ON_GPU if self.call.base.facts.device.type == "cuda" else LARGE
        return self.call.flops <= large and self.recordable

    def repeated_on(self, device: torch.device) -> Repeated | None:
        """Recordings of the call on a device, if it may be recorded."""
        if device not in self._repeated and self.is_repeatable:
            self._repeated.setdefault(device, Repeated())
        return self._repeated.get(device)

    def why_unrepeated(self) -> str | None:
        """Why later runs run Python again, where the user wants that they do not; None if they do not."""
        if not self.call.base.options.replay:
            return None
        if not self.recordable:
            return self.call.base.why_unrecordable
        if not self.is_repeatable:
            return "it is too large to be recorded (and Python weighs little)"
        return next((repeated.refusal for repeated in self._repeated.values() if repeated.refusal), None)


class Planned(Execution):
    """Carries out a computation, by a plan (`plan.py`)."""

    def __init__(self, call: Computation, choice: Choice | None = None):
        super().__init__(call)
        self.computation, self.choice = call, choice or Choice()

    @property
    def plain_kernels(self) -> frozenset[str]:
        call = self.computation
        lacking = FUSED if self.choice.plan.core > 0 else call.base.lacking if call.derivatives else NONE
        return call.base.facts.fused_kernels & (lacking | call.derive(_lacking_kernels))

    @property
    def recordable(self) -> bool:
        return self.computation.recordable

    def prepare(self) -> None:
        for level in self.computation.levels():
            level.explore()
        self.call.derive(_lacking_kernels)
        self.choice.prepare(self.computation)

    def settled(self, tensors: Tensors) -> Plan:
        """The plan of the call, proven on operands if it is not yet."""
        if not self.choice.is_final:
            self.choice.settle(self.computation, tensors)
        return self.choice.plan

    def by_plan(self, tensors: Tensors, work: Callable[[Plan], Tensors]) -> Tensors:
        """What `work` returns with a plan that is right on operands, or on the first few of them."""
        plan = self.settled(tensors)
        try:
            return work(plan)
        except RuntimeError as exc:  # torch may take other branches than in the proof
            if not plan.core or not says_vmap_cannot(str(exc)):
                raise
            self.choice.reject(self.computation, plan, quote(exc))
        return self.by_plan(tensors, work)

    def execute(self, *tensors: torch.Tensor) -> Tensors:
        return self.by_plan(tensors, lambda plan: self.computation.compute(plan, *tensors))

    def repeat(self, *tensors: torch.Tensor) -> Tensors:
        self.settled(tensors)  # a proof is not to be recorded
        return self.run_repeatedly(self.execute, tensors)

    def run_repeatedly(self, work: Callable[..., Tensors], tensors: Tensors) -> Tensors:
        """What `work` returns on `tensors`, recorded if that is still to be done."""
        repeated = self.repeated_on(tensors[0].device) if tensors else None
        return work(*tensors) if repeated is None else repeated.run(work, tensors)

    def replay(self, operands: Tensors, results: Tensors) -> bool:
        repeated = self.repeated_on(results[0].device) if results else None
        if repeated is None or repeated.replays is None:
            return False
        repeated.replays[0]([], *operands, *results)
        return True


def planned(call: Computation) -> Planned:
    """What carries out a computation."""
    execution = call.execution
    assert isinstance(execution, Planned)
    return execution


def _lacking_kernels(call: Computation) -> frozenset[str]:
    """The fused kernels that lack the derivatives that the call takes; raises where torch has none in their place."""
    # What is differentiated after a Jacobian-vector product by reverse mode is the backward's backward.
    order = len(call.derivatives) + call.derivatives[1:].count("jvp")
    lacking = lacking_derivatives(order, forward="jvp" in call.derivatives)
    refuse_scripted(call.base.name, call.base.facts.fused_kernels, lacking)
    return lacking


def execute(call: TorchCall, *tensors: torch.Tensor, repeats: bool) -> Tensors:
    """Run a call outermost, on the thread of the compiled program; `repeats`: of one that runs many times."""
    execution, kernels = call.execution, call.base.facts.fused_kernels
    run = execution.repeat if repeats else execution.execute
    lends = scope.opened() if call.base.reenters and call is not call.base else _NO_SCOPE
    with neutral(), torch.no_grad(), lends:
        if not kernels:
            return run(*tensors)
        try:
            with chosen(kernels, inference=call is call.base, plain=execution.plain_kernels):
                return run(*tensors)
        except RuntimeError as exc:
            if not says_no_evaluation_backward(str(exc)) or "recurrent" in execution.plain_kernels:
                raise
            call.base.lacking = frozenset({"recurrent"})
        with chosen(kernels, inference=False, plain=execution.plain_kernels):
            return run(*tensors)


_NO_SCOPE = contextlib.nullcontext()
