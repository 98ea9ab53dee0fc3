"""The proof of a plan: it gives what torch.autograd and loops over examples give.

It is made once, on the operands of a first run: two examples of each batch, and random tangents and cotangents, since
those given may be zero. Where torch.autograd has no formula, or would take long, finite differences take its place.
Results that are zero and examples that are alike prove little; then there is a second point, close by.
"""

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import TorchCallError, quote
from ..internals.transforms import without_transforms
from ..modes.host_random import host_generators_kept
from ..replay.repeated import LARGE
from ..values import dtypes
from ..values.dtypes import is_inexact_tensor, precision_of
from . import reverse
from .lost_gradients import refuse_lost_gradients
from .own_functions import applications, with_wrong_gradients
from .plan import Plan, is_certain

if TYPE_CHECKING:
    from ..types import Tensors
    from .call import Computation

_CLOSE = 1e-2
"""How far away the second point is, in relation to the largest operand."""
_TOLERANCE = {1: 0.5, 2: 0.2, 4: 1e-4, 8: 1e-8}
"""By the bytes of the least precise real number: how far off an output may be, in relation to its largest value."""
_ROUNDING = {1: (0.1,), 2: (1e-2,), 4: (1e-6,), 8: (1e-10, 1e-6)}
"""How far operands are moved to see what rounding may do; the call may compute less precisely than in its operands."""
_OF_DIFFERENCES = {4: 5e-2, 8: 1e-4}
"""The same where finite differences tell what is right."""
_MOST_BYTES = 2**30


def disagreement(call: "Computation", plan: Plan, tensors: "Tensors") -> str | None:
    """What speaks against a plan, on the operands of a first run or on the first few of them; None if nothing does.

    Raises what the call raises by any plan.
    """
    small, operands = call.sampled(tensors)
    with without_transforms(), host_generators_kept():
        operands = _with_directions(small, operands)
        refuse_lost_gradients(small, operands)
        if is_certain(plan, small):
            return None
        if len(call.derivatives) < 2:
            return _objection(small, plan, operands)
        with applications() as found:
            objection = _objection(small, plan, operands)
        wrong = with_wrong_gradients(found) if objection is None else None
    if wrong:
        raise TorchCallError(
            f"{call.name}: torch has the derivative of the gradient of {wrong}, a torch.autograd.Function, wrong, by "
            "finite differences: its backward uses what its forward computed, which torch takes for a constant there. "
            "Let it save nothing but its inputs and outputs, by `ctx.save_for_backward`, or compute by ops what it "
            "computes. First derivatives are right."
        )
    return objection


def _objection(call: "Computation", plan: Plan, operands: "Tensors") -> str | None:
    """What speaks against a plan on the operands of a few examples."""
    if not plan.core:
        return _cut(call, plan, operands)
    objection, is_shown = _compare(call, plan, operands)
    if objection is None and not (is_shown and _examples_differ(call, operands)) and not _are_large(operands):
        with contextlib.suppress(Exception):  # the call need not be defined there
            objection, _ = _compare(call, plan, _moved(call, operands, _CLOSE))
    return objection


def _cut(call: "Computation", plan: Plan, operands: "Tensors") -> str | None:
    """Why torch.autograd cannot differentiate its gradients; None if it can."""
    rows = "always" if plan.rows == "always" else "never"
    try:
        call.compute(replace(plan, rows=rows, audited=True), *operands)
    except RuntimeError as exc:
        return quote(exc) if reverse.cannot_repeat(exc) else None
    except Exception:  # the callable's own, which comes again
        return None
    return None


def _compare(call: "Computation", plan: Plan, operands: "Tensors") -> tuple[str | None, bool]:
    """What speaks against a plan on some operands, and whether something would be seen to."""
    try:
        expected, tolerance = _expected(call, operands)
    except Exception as exc:
        return _without_comparison(call, plan, operands, exc), True
    try:
        actual = call.compute(plan, *operands)
    except Exception as exc:
        return quote(exc), True
    errors = [_error(a, e, tolerance) for a, e in zip(actual, expected, strict=True)]
    if any(errors):
        rounding = _rounding(call, operands, expected)
        errors = [0.0 if e <= 30 * r else e for e, r in zip(errors, rounding, strict=True)]
    wrong = next((i for i, e in enumerate(errors) if e), None)
    objection = None if wrong is None else f"it gives other values, output {wrong} is off by {errors[wrong]:.2g}"
    return objection, all(map(_has_values, expected))


def _expected(call: "Computation", operands: "Tensors") -> tuple["Tensors", float]:
    """What the call gives for certain, and how far off other results may be, in relation to the largest value."""
    n_bytes = _precision(call, operands)
    products = [level.depth for level in call.levels() if level.transform == "jvp"]
    has_differences = bool(products) and n_bytes in _OF_DIFFERENCES
    if not (has_differences and call.flops > LARGE):
        try:
            return call.compute(Plan(rows="never", audited=True), *operands), _TOLERANCE[n_bytes]
        except Exception:
            if not has_differences:
                raise
    return call.compute(Plan(rows="never", audited=True, differences=products[0]), *operands), _OF_DIFFERENCES[n_bytes]


def _rounding(call: "Computation", operands: "Tensors", expected: "Tensors") -> list[float]:
    """How much each output changes with operands that change in their last digits."""
    distances = [0.0] * len(expected)
    for amount in _ROUNDING[_precision(call, operands)]:
        with contextlib.suppress(Exception):  # the call need not be defined there
            nearby, _ = _expected(call, _moved(call, operands, amount))
            found = [_distance(n, e) for n, e in zip(nearby, expected, strict=True)]
            distances = [d or (f if math.isfinite(f) else 0.0) for d, f in zip(distances, found, strict=True)]
    return distances


def _without_comparison(call: "Computation", plan: Plan, operands: "Tensors", failure: Exception) -> str:
    """What speaks against a plan where nothing can vouch for it, because of `failure`."""
    try:
        call.compute(plan, *operands)
    except Exception as exc:
        is_torchs = type(exc) in (RuntimeError, NotImplementedError)  # which it raises for all kinds of reasons
        if quote(exc) == quote(failure) or (type(exc) is type(failure) and not is_torchs):
            raise  # it is not the plan's, but of the operands
        return quote(exc)
    return f"nothing can vouch for it ({quote(failure)})"


# --- operands --------------------------------------------------------------------------------------


def _with_directions(call: "Computation", operands: "Tensors") -> "Tensors":
    """Operands with random ones in the place of tangents and cotangents, which may be left out, or are many."""
    if len(operands) == len(call.in_avals) and _are_large(operands):
        return operands
    device = operands[0].device
    generator = torch.Generator(device).manual_seed(0)

    def direction(i: int) -> torch.Tensor:
        aval = call.in_avals[i]
        dtype = dtypes.to_torch_dtype(aval.dtype)
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        return torch.randn(aval.shape, dtype=wide, device=device, generator=generator).to(dtype)

    return tuple(direction(i) if i in call.directions else operands[i] for i in range(len(call.in_avals)))


def _moved(call: "Computation", operands: "Tensors", amount: float) -> "Tensors":
    """Operands at another point, with the same tangents and cotangents."""
    generator = torch.Generator(operands[0].device).manual_seed(1)

    def move(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, device=x.device, generator=generator)
        return (_wide(x) + amount * (_size(x) or 1.0) * noise).to(x.dtype)

    return tuple(
        move(x) if is_inexact_tensor(x) and x.numel() and i not in call.directions else x
        for i, x in enumerate(operands)
    )


def _examples_differ(call: "Computation", operands: "Tensors") -> bool:
    """Whether every batch has examples that differ."""
    differ: dict[int, bool] = {}
    for i, (x, axes) in enumerate(zip(operands, call.in_axes, strict=True)):
        for level, axis in () if i in call.directions else axes.items():
            alike = x.shape[axis] == 2 and torch.equal(*x.unbind(axis))
            differ[level] = differ.get(level, False) or not alike
    return all(differ.values())


def _are_large(operands: "Tensors") -> bool:
    """Whether there is to be no second set of operands."""
    return sum(x.numel() * x.itemsize for x in operands) > _MOST_BYTES


# --- results ---------------------------------------------------------------------------------------


def _error(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """How far an output is off what is right; 0 if it is not."""
    distance, size = _distance(actual, expected), _size(expected)
    rounding = 100 * torch.finfo(expected.dtype).eps if is_inexact_tensor(expected) and not size else 0.0
    return 0.0 if distance <= max(tolerance * size, rounding) else distance


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference where the expected values are numbers; infinite where others are none."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = _wide(actual), _wide(expected)
    differences = (actual - expected)[expected.isfinite()].abs()
    return float(differences.nan_to_num(nan=math.inf).max()) if differences.numel() else 0.0


def _size(tensor: torch.Tensor) -> float:
    """The largest finite value."""
    values = _wide(tensor)
    values = values[values.isfinite()].abs()
    return float(values.max()) if values.numel() else 0.0


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether there is anything in an output that another result would differ from."""
    return tensor.numel() == 0 or not is_inexact_tensor(tensor) or _size(tensor) > 0


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _precision(call: "Computation", operands: "Tensors") -> int:
    """The bytes of the least precise real number that a call computes with."""
    return min(call.base.facts.precision, precision_of(operands))
