"""A recording as Python code that runs its ops again, and nothing else.

What Python, `torch.func` and torch's autograd do around the ops of a small call takes longer than the ops, and a few
percent of a large one. A call whose ops do not depend on values runs the same ones each time, on the same arguments, so
that those alone give the same bits.

Ops that have an `out` variant write outputs where they belong; others' are copied, and freed at once.

Source: the idea is that of [torch.fx](https://docs.pytorch.org/docs/stable/fx.html) and of CUDA graphs.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..internals.memory import copy_each
from ..internals.ops import SET_GRAD_ENABLED, torch_pytree
from ..values.memory import memory_key
from ..values.statics import static_key
from .cuda_graphs import MOST_BYTES, Captured
from .recording import Recorder
from .steps import NOTHING, Part, Slot, Step

_MOST_WAITING = 2**25  # bytes of outputs on a GPU that wait to be copied together
Replay = Callable[..., list[torch.Tensor]]
"""Takes a list of what the part before keeps for it, which it empties, its inputs, and tensors into which it writes its
outputs; returns a list of what it keeps for the next part. It may leave another grad mode."""


def codes_of(recorder: Recorder) -> "tuple[Code, ...]":
    """The parts of a recording, each as code."""
    codes: list[Code] = []
    kept: list[int] = []
    for part in reversed(recorder.parts):
        codes.append(Code(recorder, part, kept))
        kept = codes[-1].given
    return tuple(codes[::-1])


class OtherValueError(Exception):
    """A value that Python has read is another one than in the recording."""


def _check_value(value: Any, recorded: Any) -> None:
    if value != recorded and not (value != value and recorded != recorded):
        raise OtherValueError


class Code:
    """One part as code: a line for each op, which costs less than to interpret them.

    **Arguments:**

    - `recorder`: the recording.
    - `part`: one of its parts.
    - `kept`: the slots that the next part needs of it.
    """

    def __init__(self, recorder: Recorder, part: Part, kept: list[int]):
        self._memory, self._outputs, self._kept = recorder.memory, part.outputs, kept
        self._direct = self._find_direct(part)
        self._copied = [(i, slot.number) for i, slot in enumerate(part.outputs) if i not in self._direct.values()]
        steps = self._needed(part.steps)
        used = {n for step in steps for n in step.operands()} | {n for _, n in self._copied} | {*kept}
        made = {slot.number for step in steps for slot in step.results if slot}
        inputs = [slot.number for slot in part.inputs]
        self._n_inputs = len(inputs)
        outside = sorted(used - made - {*inputs})
        self.given = [n for n in outside if n not in recorder.constants]
        """The slots it needs of the part before."""
        self._names: dict[int, str] = {}
        self.values = {self._show(Slot(n)): recorder.constants[n] for n in outside if n in recorder.constants}
        """The globals of the code: constants, ops, and what has no literal."""
        self.reads = any(step.read is not NOTHING for step in steps)
        """Whether Python has read values."""
        self._is_on_gpu = any(x.is_on_gpu for x in part.results)
        copied_at = self._copied_at(steps)
        self.source = "\n    ".join(self._lines(steps, copied_at, inputs, len(part.outputs)))
        self._most_bytes = self._peak(steps, copied_at, (*inputs, *outside))

    def same_as(self, other: "Code") -> bool:
        """Whether both do the same. Each holds its constants, so equal addresses are of the same tensors."""
        return self.source == other.source and self._keys() == other._keys()

    def compile(self) -> Replay:
        """The code as a function."""
        scope: dict[str, Any] = {**self.values}
        exec(self.source, scope)
        run = scope["run"]
        return Captured(run, self._n_inputs) if self._is_on_gpu and self._most_bytes <= MOST_BYTES else run

    def _keys(self) -> dict[str, Any]:
        return {name: _key(value) for name, value in self.values.items()}

    def _find_direct(self, part: Part) -> dict[int, int]:
        """Slots that an op can make where an output belongs, each with its number: nothing else needs their memory."""
        makers = {step.made.number: step.op for step in part.steps if step.made}
        storage = {n: memory.storage for n, memory in self._memory.items()}
        elsewhere = {storage[n] for n in self._kept}
        elsewhere |= {storage[n] for step in part.steps if step.writes for n in step.operands()}
        outputs = [storage[slot.number] for slot in part.outputs]
        direct = {}
        for i, slot in enumerate(part.outputs):
            first = min(n for n in storage if storage[n] == outputs[i])  # the output itself, or it is a view of this
            if first not in makers or makers[first] not in OUT_VARIANTS:
                continue
            whole = [self._memory[slot.number], self._memory[first]]
            filled = all(memory.is_filled for memory in whole) and whole[0].dtype == whole[1].dtype
            if filled and outputs[i] not in elsewhere and outputs.count(outputs[i]) == 1:
                direct[first] = i
        return direct

    def _needed(self, steps: list[Step]) -> list[Step]:
        """The steps on which an output or what is kept depends, and those that check values."""
        wanted = {n for _, n in self._copied} | {*self._kept} | self._direct.keys()
        needed = []
        for step in reversed(steps):
            if step.writes or step.checks or any(slot.number in wanted for slot in step.results if slot):
                wanted |= step.operands()
                needed.append(step)
        return needed[::-1]

    def _lines(self, steps: list[Step], copied_at: dict[int, int], inputs: list[int], n_outputs: int) -> list[str]:
        results = [f"r{i}" for i in range(n_outputs)]
        lines = [f"def run({', '.join(['kept', *(self._show(Slot(n)) for n in inputs), *results])}):"]
        if self.given:
            lines += [f"{''.join(self._show(Slot(n)) + ', ' for n in self.given)} = kept", "kept.clear()"]
        lines += self._copies(copied_at, -1)
        last = {n: i for i, step in enumerate(steps) for n in step.slots()}
        last |= {n: max(last.get(n, -1), i) for n, i in copied_at.items()}
        staying = {*inputs, *self._kept}
        grad_mode = None
        for i, step in enumerate(steps):
            if step.grad_mode is not grad_mode:
                grad_mode = step.grad_mode
                lines.append(f"{self._global(SET_GRAD_ENABLED)}({grad_mode})")
            lines += [self._line(step), *self._copies(copied_at, i)]
            near = {*step.slots(), *(n for n in copied_at if copied_at[n] == i)}
            names = [self._show(Slot(n)) for n in sorted(near - staying) if last[n] == i]
            names = [name for name in names if name not in self.values]
            lines += [f"del {', '.join(names)}"] if names else []
        return [*lines, f"return {self._show([Slot(n) for n in self._kept])}"]

    def _copied_at(self, steps: list[Step]) -> dict[int, int]:
        """For each slot to be copied, the number of the step after which that is done; or -1.

        It is the one that makes it or, last, writes its memory, so that this is free for the next ones. On a GPU,
        where a copy costs a launch, those that are ready meanwhile wait for each other, up to some memory.
        """
        made = {slot.number: i for i, step in enumerate(steps) for slot in step.results if slot}
        written = {self._memory[n].storage: i for i, step in enumerate(steps) if step.writes for n in step.operands()}
        ready = {n: max(made.get(n, -1), written.get(self._memory[n].storage, -1)) for _, n in self._copied}
        if not self._is_on_gpu:
            return ready
        at, waiting, n_bytes = dict[int, int](), list[int](), 0
        in_order = sorted(ready, key=lambda n: ready[n])
        for n in in_order:
            waiting.append(n)
            n_bytes += self._memory[n].n_bytes
            if n_bytes >= _MOST_WAITING or n == in_order[-1]:
                at |= dict.fromkeys(waiting, ready[n])
                waiting, n_bytes = [], 0
        return at

    def _copies(self, copied_at: dict[int, int], step: int) -> list[str]:
        """What copies outputs after a step: together, where all are dense, if that saves launches."""
        groups: dict[Any, list[tuple[int, int]]] = {}
        for i, n in self._copied:
            if copied_at[n] == step:
                memory = self._memory[n]
                groups.setdefault(memory.dtype if self._is_on_gpu and memory.is_filled else i, []).append((i, n))
        return [self._copy(group) for group in groups.values()]

    def _copy(self, outputs: list[tuple[int, int]]) -> str:
        targets, sources = [f"r{i}" for i, _ in outputs], [self._show(Slot(n)) for _, n in outputs]
        if len(outputs) == 1:
            return f"{targets[0]}.copy_({sources[0]})"
        return f"{self._global(copy_each)}([{', '.join(targets)}], [{', '.join(sources)}])"

    def _peak(self, steps: list[Step], copied_at: dict[int, int], from_outside: Iterable[int]) -> int:
        """Bytes of what the steps make, as much of it as is there at a time; slots `from_outside` are there before."""
        sizes, made_at, used_at = dict[int, int](), dict[int, int](), dict[int, int]()
        others = {self._memory[n].storage for n in (*from_outside, *self._direct)}
        for i, step in enumerate(steps):
            for memory in [self._memory[slot.number] for slot in step.results if slot]:
                if memory.storage not in others:
                    made_at.setdefault(memory.storage, i)
                    sizes[memory.storage] = max(sizes.get(memory.storage, 0), memory.n_bytes)
            used_at |= {self._memory[n].storage: i for n in step.slots()}
        for n, i in (*copied_at.items(), *((n, len(steps)) for n in self._kept)):
            storage = self._memory[n].storage
            used_at[storage] = max(used_at.get(storage, -1), i)
        changes = [0] * (len(steps) + 2)
        for storage, size in sizes.items():
            changes[made_at[storage]] += size
            changes[used_at[storage] + 1] -= size
        return max(itertools.accumulate(changes))

    def _line(self, step: Step) -> str:
        if step.read is not NOTHING:
            return self._check(step)
        op, given = step.op, [*map(self._show, step.args), *(f"{k}={self._show(v)}" for k, v in step.kwargs.items())]
        if step.made and step.made.number in self._direct:
            op = OUT_VARIANTS[op]
            given.append(f"{op._schema.arguments[-1].name}={self._result(step.made.number)}")
        results = [self._show(slot) if slot else "_" for slot in step.results]
        target = _target(torch_pytree.tree_unflatten(results, step.structure))
        return f"{target} = {self._global(op._op)}({', '.join(given)})"

    def _check(self, step: Step) -> str:
        """What goes on only where a value is the one that was read."""
        read = f"{self._global(step.op)}({', '.join(map(self._show, step.args))})"
        return f"{self._global(_check_value)}({read}, {self._show(step.read)})"

    def _result(self, made: int) -> str:
        """Where a slot is made that is an output, or has it as a view."""
        i = self._direct[made]
        shape, wanted = self._memory[made].shape, self._memory[self._outputs[i].number].shape
        return f"r{i}" if shape == wanted else f"r{i}.view({self._show(shape)})"

    def _show(self, value: Any) -> str:
        match value:
            case Slot():
                return self._names.setdefault(value.number, f"t{len(self._names)}")
            case list() | tuple():
                return "[" + ", ".join(map(self._show, value)) + "]"
            case None | bool() | int():
                return repr(value)
        return self._global(value)

    def _global(self, value: Any) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = value
        return name


def _target(names: Any) -> str:
    """What an op's results are assigned to."""
    return names if isinstance(names, str) else f"[{', '.join(map(_target, names))}]"


def _key(value: Any) -> Any:
    """What a global of code is, for comparisons: others than these may not know how to compare themselves."""
    if isinstance(value, torch.Tensor):
        return memory_key(value)
    return static_key(value) if isinstance(value, _COMPARABLE) else id(value)


_COMPARABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)

_aten = torch.ops.aten
OUT_VARIANTS = {
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
    _aten.bmm.default: _aten.bmm.out,
    _aten.baddbmm.default: _aten.baddbmm.out,
    _aten.sum.dim_IntList: _aten.sum.IntList_out,
    _aten.add.Tensor: _aten.add.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.tanh.default: _aten.tanh.out,
    _aten.sigmoid.default: _aten.sigmoid.out,
    _aten.gelu.default: _aten.gelu.out,
    _aten.threshold_backward.default: _aten.threshold_backward.grad_input,
    _aten.tanh_backward.default: _aten.tanh_backward.grad_input,
    _aten.sigmoid_backward.default: _aten.sigmoid_backward.grad_input,
    _aten.gelu_backward.default: _aten.gelu_backward.grad_input,
}
"""Ops whose result can be written into given memory. Those of loss functions, for example, resize it meanwhile, which
XLA's must not be."""
