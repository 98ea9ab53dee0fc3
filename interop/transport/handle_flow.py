"""Which backward calls of a compiled program find the handle where the forward call left it.

On a GPU a handle is known by its place (`handles.py`), which holds as long as XLA does not copy it. It does not where
the forward call and the backward call stand in one block of the program, once functions are inlined: the handle's
buffer then goes from one to the other. It does where handles are stacked by a loop, or chosen by a branch.

Source: [StableHLO](https://openxla.org/stablehlo/spec), [MLIR Python bindings](https://mlir.llvm.org/docs/Bindings/Python/).
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

_CUSTOM_CALL, _CALL, _FUNCTION = "stablehlo.custom_call", "func.call", "func.func"


class HandleFlow:
    """The calls in one module that make or take handles, by the number that each has in the program."""

    def __init__(self, module: Any):
        self._module, self._lock = module, threading.Lock()
        self._makers: set[int] = set()
        self._takers: dict[int, int] = {}
        self._makers_of: dict[int, set[int]] = {}
        self._unproven: dict[int, int] = {}

    def add_maker(self, number: int) -> None:
        """A forward call, which makes a handle as its last result."""
        self._makers.add(number)

    def add_taker(self, number: int, operand: int) -> None:
        """A backward call, and which of its operands is the handle."""
        self._takers[number] = operand

    def is_straight(self, number: int) -> bool:
        """Whether a backward call gets its handle straight from a forward call, or a forward call gives its handle
        straight to a backward call. To be asked when the module is complete: it is read once, then let go."""
        with self._lock:
            if self._module is not None:
                self._makers_of = _straight(self._module, self._makers, self._takers)
                self._unproven = dict.fromkeys(self._makers_of, _PROOFS)
                self._module = None
        return number in self._makers_of or any(number in makers for makers in self._makers_of.values())

    @property
    def is_proven(self) -> bool:
        """Whether what the program says has been seen to hold."""
        return not self._unproven

    def prove(self, number: int, holds: Callable[[], bool]) -> bool:
        """Whether a straight taker did get its handle straight, which is looked at in its first runs."""
        if number in self._unproven:
            self._unproven[number] -= 1
            if not holds():
                self._unproven.pop(number)
                self._makers_of.pop(number)
                return False
            if self._unproven[number] == 0:
                self._unproven.pop(number)
        return True


_PROOFS = 2  # runs


def flow_of(module_context: Any) -> HandleFlow:
    """The flow of handles in the module that is being lowered, whose executable keeps it alive."""
    flow = next((kept for kept in module_context.keepalives if isinstance(kept, HandleFlow)), None)
    if flow is None:
        flow = HandleFlow(module_context.module)
        module_context.add_keepalive(flow)
    return flow


def _straight(module: Any, makers: set[int], takers: dict[int, int]) -> dict[int, set[int]]:
    """The numbers of takers that get their handle straight, each with the makers it gets it from.

    A function that is called in several places stands in each of them, so that all must be straight.
    """
    program, found = _Program(module), dict[int, list[int | None]]()
    for number, call in program.calls(takers):
        handle = call.operands[takers[number]]
        found.setdefault(number, []).extend(program.makers_of(handle, call.parent_block(), makers))
    straight = {number: {maker for maker in by if maker is not None} for number, by in found.items()}
    return {number: by for number, by in straight.items() if None not in found[number]}


class _Op:
    """An operation with the block that it is in: the bindings have no cheap way from one to the other."""

    def __init__(self, op: Any, block: "_Block"):
        self.op, self._block = op, block

    @property
    def operands(self) -> Any:
        return self.op.operands

    def parent_block(self) -> "_Block":
        return self._block


class _Block:
    """A block: its function, if it is the body of one, and the operations that make values in it."""

    def __init__(self, function: str | None, block: Any):
        self.function, self.arguments = function, list(block.arguments)
        self.ops = [_Op(op.operation, self) for op in block.operations]
        self.makers = {(result.owner, result.result_number): op for op in self.ops for result in op.op.results}


class _Program:
    """A module: its blocks, its functions by name, and where each is called."""

    def __init__(self, module: Any):
        self._blocks: list[_Block] = []
        self._visit(module.operation, None)
        self._bodies = {block.function: block for block in self._blocks if block.function is not None}
        self._callers: dict[str, list[_Op]] = {}
        for block in self._blocks:
            for op in block.ops:
                if op.op.name == _CALL:
                    self._callers.setdefault(_callee(op.op), []).append(op)

    def _visit(self, operation: Any, function: str | None) -> None:
        for region in operation.regions:
            for i, block in enumerate(region.blocks):
                visited = _Block(function if i == 0 else None, block)
                self._blocks.append(visited)
                for op in visited.ops:
                    is_function = op.op.name == _FUNCTION
                    self._visit(op.op, _text(op.op.attributes["sym_name"]) if is_function else None)

    def calls(self, numbers: Any) -> Iterator[tuple[int, _Op]]:
        """The custom calls that carry one of these numbers."""
        for block in self._blocks:
            for op in block.ops:
                number = _number(op.op)
                if number is not None and number in numbers:
                    yield number, op

    def makers_of(self, handle: Any, block: _Block, makers: set[int]) -> Iterator[int | None]:
        """The calls that make a handle which is used in a block, one for each place where the block stands; None
        where it is made otherwise."""
        op = block.makers.get(_result(handle))
        if op is not None:
            yield from self._makers_of_result(op, handle.result_number, makers)
        elif block.function in self._callers and handle in block.arguments:
            argument = block.arguments.index(handle)
            for caller in self._callers[block.function]:
                yield from self.makers_of(caller.operands[argument], caller.parent_block(), makers)
        else:
            yield None

    def _makers_of_result(self, op: _Op, result: int, makers: set[int]) -> Iterator[int | None]:
        if op.op.name == _CALL:
            body = self._bodies[_callee(op.op)]
            returned = body.ops[-1].operands[result]
            inner = body.makers.get(_result(returned))
            if inner is None:
                yield None
            else:
                yield from self._makers_of_result(inner, returned.result_number, makers)
        else:
            number = _number(op.op)
            yield number if number in makers else None


def _result(value: Any) -> Any:
    """What identifies a value that an operation makes; None for arguments of blocks."""
    number = getattr(value, "result_number", None)
    return None if number is None else (value.owner, number)


def _callee(op: Any) -> str:
    return _text(op.attributes["callee"])


def _text(attribute: Any) -> str:
    return attribute.value


def _number(op: Any) -> int | None:
    """The number of a torch call."""
    if op.name != _CUSTOM_CALL or "mhlo.backend_config" not in op.attributes:
        return None
    config = op.attributes["mhlo.backend_config"]
    return config["number"].value if hasattr(config, "__contains__") and "number" in config else None
