"""Where checks are carried out: both sides of a subject, and what both have in common."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import torch

from ...interop.values.dtypes import precision_of
from .jax_side import Ours
from .numbers import DOUBLE, HALF, SINGLE, NotAskedError, WrongError, compare, normal, size_of, to_numpy
from .subject import Subject, like, tensors_of
from .torch_side import Torch, changes_state

STEP = 1e-5
"""Of finite differences in float64."""


class Bench:
    """Makes both sides of a subject, and remembers those in JAX."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.made: list[Ours] = []
        """The JAX sides that a check has made."""

    def torch(self, *, double: bool = False, drawing: bool = False) -> Torch:
        """torch's side, its state the first one."""
        return Torch(self.subject, double=double, drawing=drawing)

    def ours(self, *, double: bool = False, drawing: bool = False) -> Ours:
        """The side in JAX."""
        stateful = self._changes_state_drawing if drawing else self.changes_state
        self.made.append(Ours(self.subject, double=double, drawing=drawing, stateful=stateful))
        return self.made[-1]

    @cached_property
    def changes_state(self) -> bool:
        """Whether a call changes buffers."""
        return changes_state(self.subject)

    @cached_property
    def _changes_state_drawing(self) -> bool:
        """The same of a call that draws random numbers."""
        return changes_state(self.subject, drawing=True)

    @cached_property
    def tolerance(self) -> float:
        """How far off numbers may be in the user's dtypes."""
        side = self.torch()
        given = (*self.subject.arguments(0), *side.module.parameters(), *side.module.buffers())
        return HALF if precision_of(tensors_of(given)) < 4 else SINGLE

    @property
    def smooth(self) -> bool:
        """Whether finite differences in float64 tell second derivatives."""
        return self.subject.smooth if self.subject.smooth is not None else self._second == "derivative"

    @property
    def is_cut(self) -> bool:
        """Whether torch's double backward is not the derivative of its gradient."""
        return self._second == "cut"

    @cached_property
    def _second(self) -> Literal["derivative", "cut", "unknown"]:
        """What torch's double backward is, in the light of finite differences; if there is none, whether these tell."""
        if self._why_not_double:
            return "unknown"
        with wide(True), contextlib.suppress(WrongError, RuntimeError, ValueError):  # nearby it need not be defined
            side = self.torch(double=True)
            args = side.arguments(0)
            direction = self.direction(side, args)
            found, other = (side.differences(side.gradients, args, direction, step) for step in (STEP, 10 * STEP))
            by_torch = None
            with contextlib.suppress(RuntimeError):
                by_torch = side.double_backward(args, direction)
            if by_torch is not None and _agree(by_torch, found):
                return "derivative"
            compare(found, other, "", DOUBLE)
            return "derivative" if by_torch is None else "cut"
        return "unknown"

    @cached_property
    def _why_not_double(self) -> str | None:
        """Why torch has no gradients in float64, if it has none."""
        with wide(True):
            try:
                side = self.torch(double=True)
                side.gradients(side.arguments(0))
            except Exception as exc:  # whatever the user's code raises
                return f"torch cannot compute it in float64: {first_line(exc)}"
        return None

    @cached_property
    def slopes(self) -> "Slopes":
        """The slope of torch's weighted sum along a direction in float64; `NotAskedError` if torch has none there."""
        if self._why_not_double:
            raise NotAskedError(self._why_not_double)
        with wide(True):
            side = self.torch(double=True)
            args = side.arguments(0)
            return what_torch_can(lambda: Slopes.of(side, args, self.direction(side, args)))

    @property
    def is_plain(self) -> bool:
        """Whether finite differences of its outputs tell its derivatives, too."""
        return self.smooth and self.slopes.off <= DOUBLE

    @staticmethod
    def direction(side: Torch, args: tuple[Any, ...]) -> list[np.ndarray]:
        """A direction for all that is differentiated by."""
        rng, n_parameters = np.random.default_rng(0), len(side.parameters)
        drawn = [(normal(rng, to_numpy(x)), x.detach()) for x in side.wanted(args)]
        along = [like(torch.from_numpy(d), x.cpu()).numpy() for d, x in drawn[n_parameters:]]
        return [*(d for d, _ in drawn[:n_parameters]), *along]

    def check_differentiable(self) -> None:
        """`NotAskedError` if there is nothing to differentiate."""
        side = self.torch()
        args = side.arguments(0)
        if not side.wanted(args):
            raise NotAskedError("neither parameters nor arguments of floats")
        if not what_torch_can(lambda: side.is_differentiable(args)):
            raise NotAskedError("no output depends on parameters or arguments in a way that torch differentiates")


@dataclass(frozen=True)
class Slopes:
    """A slope by torch's gradient and by finite differences of torch's outputs."""

    by_gradient: float
    by_differences: tuple[float, ...]
    """With steps of several sizes."""
    size: float
    """How large slopes are, about."""

    @classmethod
    def of(cls, side: Torch, args: tuple[Any, ...], direction: list[np.ndarray]) -> "Slopes":
        """Those of the weighted sum."""
        grads = [to_numpy(g) for g in side.gradients(args)]
        slope = sum(float((g.conj() * d).sum().real) for g, d in zip(grads, direction, strict=True))
        steps = (10 * STEP, STEP, STEP / 10)
        found = tuple(float(side.differences(side.loss, args, direction, step)[0]) for step in steps)
        return cls(slope, found, max(size_of(grads), *map(abs, found), 1e-6))

    @property
    def off(self) -> float:
        """How far they are apart, with the step that suits best."""
        return min(abs(x - self.by_gradient) for x in self.by_differences) / self.size

    @property
    def is_settled(self) -> bool:
        """Whether finite differences tell a derivative: they hardly depend on the step."""
        return max(self.by_differences) - min(self.by_differences) <= _SETTLED * self.size


_SETTLED = 1e-3


def _agree(actual: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    try:
        compare(actual, expected, "", DOUBLE)
    except WrongError:
        return False
    return True


def what_torch_can(compute: Callable[[], Any]) -> Any:
    """What torch computes; `NotAskedError` with its message if it cannot."""
    try:
        return compute()
    except RuntimeError as exc:
        raise NotAskedError(f"torch cannot: {first_line(exc)}") from exc


@contextlib.contextmanager
def torch_cannot(compute: Callable[[], Any]) -> Iterator[None]:
    """Turns an error of torchleaf into `NotAskedError` where torch raises one, too."""
    try:
        yield
    except (NotAskedError, WrongError):
        raise
    except Exception:
        what_torch_can(compute)
        raise


@contextlib.contextmanager
def wide(enable: bool) -> Iterator[None]:
    """64-bit floats for a while, in JAX and for what modules make inside their forward."""
    if not enable:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(before)


def first_line(exc: BaseException) -> str:
    """An exception in one line."""
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": ")
