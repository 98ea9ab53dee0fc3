"""Scopes: what a call borrows stays with it until its outermost execution ends.

A backward pass may run a part of a module again: `torch.utils.checkpoint` does, and so do adjoint methods, reversible
layers, whose `autograd.Function` holds the module, and hooks that read weights. Then the weights must still be in the
module. So where a fake run of the backward pass showed this, calls run within a scope: what they borrow is given back
when the scope closes, and what a live graph's forward call borrowed stays with the graph, without XLA's memory.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..values.memory import storage_of


class Loan(ABC):
    """Something borrowed, with tensors put into it for the time."""

    tensors: Sequence[torch.Tensor]

    @abstractmethod
    def fits(self, lender: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether it is one of the lender's, with these very tensors."""

    @abstractmethod
    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put tensors in."""

    @abstractmethod
    def empty(self) -> None:
        """Take them out."""

    @abstractmethod
    def end(self) -> None:
        """Give it back."""


class Scope:
    """What was borrowed since it opened."""

    def __init__(self) -> None:
        self._loans: list[Loan] = []
        self._entered: list[_Lent] = []
        self._lent: list[list[_Lent]] = []

    def find(self, lender: Any, tensors: Sequence[torch.Tensor]) -> Loan | None:
        """A loan of that lender with these very tensors."""
        return next((loan for loan in self._loans if loan.fits(lender, tensors)), None)

    def add(self, loan: Loan) -> None:
        """Keep a loan until the scope closes."""
        self._loans.append(loan)

    def close(self) -> None:
        """Give everything back."""
        for loan in self._loans:
            loan.empty()
            loan.end()
        self._loans, self._entered, self._lent = [], [], []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, calls borrow here."""
        outer, _here.scope = current(), self
        try:
            yield
        finally:
            _here.scope = outer

    def put_by(self, operands: Sequence[torch.Tensor], entered: Sequence[torch.Tensor]) -> None:
        """Let go of the operands' memory, but not of the loans; `entered` are the operands as leaves of a graph."""
        operand_of = {storage_of(x): i for i, x in enumerate(operands)}
        self._entered = [_Lent(x, operand_of) for x in entered]
        self._lent = [[_Lent(x, operand_of) for x in loan.tensors] for loan in self._loans]
        self._let_go()

    @contextlib.contextmanager
    def taken_up(self, operands: Sequence[torch.Tensor]) -> Iterator[None]:
        """What was put by, as it was, with the memory of other operands of the same values."""
        for lent in self._entered:
            lent.take(operands)
        for loan, tensors in zip(self._loans, self._lent, strict=True):
            loan.fill([lent.take(operands) for lent in tensors])
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for loan in self._loans:
            loan.empty()
        for lent in (*self._entered, *(x for tensors in self._lent for x in tensors)):
            lent.let_go()


class _Lent:
    """A tensor in memory of an operand's, or of its own, which it is to have again."""

    def __init__(self, tensor: torch.Tensor, operand_of: dict[int, int]):
        self._operand = operand_of.get(storage_of(tensor))
        self._dtype, self._geometry = tensor.dtype, (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._tensor = tensor if self._operand is None or tensor.requires_grad else None

    def let_go(self) -> None:
        if self._operand is not None and self._tensor is not None:
            self._tensor.data = torch.empty(0, dtype=self._dtype, device=self._tensor.device)

    def take(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor, in memory of the operands given now; one in a graph stays in it."""
        if self._operand is None:
            assert self._tensor is not None
            return self._tensor
        operand = operands[self._operand].detach()
        memory = (operand if operand.dtype == self._dtype else operand.view(self._dtype)).as_strided(*self._geometry)
        if self._tensor is None:
            return memory
        self._tensor.data = memory
        return self._tensor


class _Here(threading.local):
    scope: Scope | None = None


_here = _Here()


def current() -> Scope | None:
    """The scope that is open in this thread, if there is one."""
    return _here.scope


@contextlib.contextmanager
def opened() -> Iterator[Scope]:
    """A scope around an execution."""
    scope = Scope()
    try:
        with scope.active():
            yield scope
    finally:
        scope.close()
