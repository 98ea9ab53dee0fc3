"""What a signature is traced of: a torch function, or whatever else says how it runs over flat tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, final

import torch

from ..errors import ForeignTensorError, TorchCallError
from ..modes.random import PASS_A_KEY
from ..types import Operand
from ..values import dtypes
from .arguments import Arguments, Filler
from .trace import Trace
from .traceable import Flat


class Target(ABC):
    """A torch callable, the leading operands of its calls, and what they are."""

    name: str
    """How errors call it."""
    callable: Callable[..., Any]
    """Its arguments are those of a call."""
    key_remedy: str = PASS_A_KEY
    """What to do where random numbers are drawn without a key."""
    is_loose: bool = False
    """Whether torch's autograd has to differentiate each call by itself, as where gradients have hooks."""

    @abstractmethod
    def operands(self, arguments: Arguments) -> list[Operand]:
        """The operands of a call, the leading ones first."""

    @abstractmethod
    def foreign(self) -> dict[int, str]:
        """Storages that the callable must not read, because operands stand for what they hold."""

    @abstractmethod
    def explained(self, failure: ForeignTensorError) -> TorchCallError:
        """The error for a callable that reads one of them."""

    @abstractmethod
    def observer(self, fill: Filler) -> Flat:
        """The callable over flat tensors, as it runs while it is traced; it returns the values of all state."""

    @abstractmethod
    def runner(self, fill: Filler, found: Trace, *, stateful: bool) -> Flat:
        """The same as compiled programs run it; of state operands it returns those in `found.state`."""

    @abstractmethod
    def check(self, found: Trace, *, stateful: bool) -> Trace:
        """Refuse what the trace found and the call cannot do; what is left of it."""

    @abstractmethod
    def refuse_write(self, operands: Collection[int], *, stateful: bool) -> NoReturn:
        """Raise the error for a run that changes state operands which the trace did not find to be changed."""
        raise NotImplementedError


@final
class FunctionTarget(Target):
    """A torch function: it has no weights, and keeps no state."""

    def __init__(self, fn: Callable[..., Any], name: str):
        self.callable, self.name = fn, name

    def operands(self, arguments: Arguments) -> list[Operand]:
        return arguments_as_operands(arguments)

    def foreign(self) -> dict[int, str]:
        return {}

    def explained(self, failure: ForeignTensorError) -> TorchCallError:
        return failure

    def observer(self, fill: Filler) -> Flat:
        fn = self.callable

        def run(*tensors: torch.Tensor) -> tuple[Any, tuple[()]]:
            args, kwargs = fill(tensors)
            return fn(*args, **kwargs), ()

        return run

    def runner(self, fill: Filler, found: Trace, *, stateful: bool) -> Flat:
        return self.observer(fill)

    def check(self, found: Trace, *, stateful: bool) -> Trace:
        return found

    def refuse_write(self, operands: Collection[int], *, stateful: bool) -> NoReturn:
        raise AssertionError(f"{self.name} has no operand that is state: {sorted(operands)}")


def arguments_as_operands(arguments: Arguments) -> list[Operand]:
    """The arrays among the arguments of a call, in the dtypes that torch expects of them."""
    named: Sequence[tuple[str, Any]] = list(zip(arguments.names(), arguments.avals, strict=True))
    return [Operand(n, aval, dtypes.operand_dtype(aval.dtype)) for n, aval in named[arguments.n_leading :]]
