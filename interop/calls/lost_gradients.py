"""Ops without a kernel for autograd: torch takes what they return for constants.

In reverse mode it warns, once for each op, and goes on; in forward mode it says nothing. So where a gradient would go
through one, the call is refused.

Source: [custom operators](https://docs.pytorch.org/tutorials/advanced/custom_ops_landing_page.html).
"""

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TorchCallError
from ..modes.aten import tensors_in
from ..modes.dispatch import Mode
from ..values.dtypes import is_inexact_tensor
from .plan import Plan

if TYPE_CHECKING:
    from ..types import Tensors
    from .call import Computation


def may_lose_gradients(call: "Computation") -> bool:
    """Whether a derivative is of a callable that has such ops."""
    return bool(call.derivatives and call.base.facts.without_autograd)


def refuse_lost_gradients(call: "Computation", operands: "Tensors") -> None:
    """`TorchCallError` if a derivative goes through such an op, on these operands."""
    if not may_lose_gradients(call):
        return
    watch = _Watch(call.base.facts.without_autograd)
    with contextlib.suppress(Exception), watch:  # of the callable's own, which come again
        call.compute(Plan(rows="never"), *operands)
    if watch.lost:
        names = ", ".join(sorted(watch.lost))
        raise TorchCallError(
            f"{call.name}: a derivative goes through {names}, for which no derivative is registered: torch takes what "
            "it returns for a constant. Register one (`torch.library.register_autograd`), or, if it has none, pass it "
            "`x.detach()`."
        )


class _Watch(Mode):
    """Notes which of some ops are given, where gradients are recorded, what requires them."""

    def __init__(self, ops: frozenset[str]):
        super().__init__()
        self._ops, self.lost = ops, set[str]()

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if func.name() in self._ops and torch.is_grad_enabled():
            given = any(x.requires_grad for x in tensors_in(*args, *kwargs.values()))
            if given and any(map(is_inexact_tensor, tensors_in(result))):
                self.lost.add(func.name())
        return result
