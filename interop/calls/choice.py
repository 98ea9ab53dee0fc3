"""The choice of a call's plan: the fastest one that torch has the rules for, and that is right."""

import functools
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import TorchCallError, quote
from ..modes.fake_run import fake_run
from ..wording import says_no_real_zeros
from .lost_gradients import may_lose_gradients
from .plan import CERTAIN, Plan, candidates, is_certain
from .proof import disagreement

if TYPE_CHECKING:
    from ..types import Tensors
    from .call import Computation


class Choice:
    """Which plan a call has: found by fake runs before its first run, and proven at it."""

    def __init__(self) -> None:
        self.plan = CERTAIN
        """The plan, once it is prepared."""
        self.is_final = False
        """Whether it is proven."""
        self.reasons: list[tuple[Plan, str]] = []
        """The faster plans that were not taken, each with the reason."""
        self._rest: list[Plan] | None = None
        self._lock = threading.RLock()

    @property
    def is_prepared(self) -> bool:
        """Whether the call was about to run."""
        return self._rest is not None

    def prepare(self, call: "Computation") -> None:
        """Choose the fastest plan for which torch has the rules."""
        with self._lock:
            if self._rest is None:
                self._rest, self.reasons = list(candidates(call)), []
                self._advance(call)

    def settle(self, call: "Computation", tensors: "Tensors") -> None:
        """Choose the fastest plan that is right on these operands: at a first run, outside all transforms."""
        with self._lock:
            self.prepare(call)
            while not self.is_final:
                reason = disagreement(call, self.plan, tensors)
                if reason is None:
                    self.is_final = True
                else:
                    self.reject(call, self.plan, reason)

    def reject(self, call: "Computation", plan: Plan, reason: str) -> None:
        """Give up a plan that has failed, for the next one."""
        with self._lock:
            if self.plan == plan:  # else another thread did
                self._give_up(plan, reason)
                self._advance(call)

    def _advance(self, call: "Computation") -> None:
        """Take the next plan that passes a fake run."""
        assert self._rest
        while (plan := self._rest.pop(0)).core:
            small = call.fewer_examples()
            failure = fake_run(functools.partial(small.compute, plan), small.in_avals, call.base.facts.device)
            if failure is None:
                break
            self._give_up(plan, quote(failure))
        self.plan, self.is_final = plan, is_certain(plan, call) and not may_lose_gradients(call)
        try:
            _tell_of_loops(call, self)
        except TorchCallError:
            self._rest, self.is_final = None, False  # to be refused again
            raise

    def _give_up(self, plan: Plan, reason: str) -> None:
        self.reasons.append((plan, reason))
        if says_no_real_zeros(reason) and not plan.real_zeros and self._rest is not None:
            self._rest.insert(0, replace(plan, real_zeros=True))


def _tell_of_loops(call: "Computation", choice: Choice) -> None:
    """Warn, once, of a batch that runs as a loop; refuse it where the user wants none."""
    looped = [level for level in call.levels() if level.transform == "vmap" and not _vectorises(choice.plan, level)]
    if not looped:
        return
    because = "it reads values, or torch.func cannot transform its derivative"
    for plan, reason in choice.reasons:
        if _vectorises(plan, looped[0]):
            because = reason.split(". ")[0].split("\n")[0]
    looped[0].tell_of_loop(because)


def _vectorises(plan: Plan, level: "Computation") -> bool:
    return level.depth <= plan.core and plan.batched
