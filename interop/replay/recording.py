"""The aten ops of a torch call, written down while it runs.

A tensor is known by its memory and its geometry. So views and writes in place need no special care, and a tensor that
no op made is recognised: it was there before, or came from Python.

Source: [TorchDispatchMode](https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-with-modes); the
idea is that of [make_fx](https://docs.pytorch.org/docs/stable/func.api.html) and CUDA graphs.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..internals.ops import DisableTorchFunction, torch_pytree
from ..modes.aten import bound, reads_values, written
from ..modes.dispatch import Mode
from ..modes.guard import Exposure
from ..modes.random import draws
from ..values.memory import is_plain, memory_key, storage_of
from .steps import Memory, Part, Result, Slot, Step

Tensors = tuple[torch.Tensor, ...]

_MOST_STEPS = 2000
"""How long a recording may be: code has to be compiled."""
_MOST_BYTES = 2**29
"""How large its outputs may be, of which it holds copies."""


class Recorder(Mode):
    """Writes down the ops that run while it is entered, part after part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.failure: str | None = None
        """Why the ops cannot be run again in the place of the call."""
        self.memory: dict[int, Memory] = {}
        self._slots: dict[Any, Slot] = {}
        self._seen: list[StorageWeakRef] = []  # their addresses are not used again; their memory is
        self._known: dict[int, int] = {}  # storages, numbered: an input's address is used again after its part
        self._n_storages = 0
        self._made: set[int] = set()  # those of them that ops made
        self._made_tensors: list[weakref.ref[torch.Tensor]] = []
        self._written: set[int] = set()  # those into which ops wrote
        self._borrowed: set[int] = set()  # storages of inputs: they belong to XLA

    def record(self, inputs: Sequence[torch.Tensor], work: Callable[[], Tensors]) -> Tensors:
        """What `work` returns; its ops on `inputs` are the next part. No input is kept."""
        self._borrowed = {storage_of(x) for x in inputs}
        part = Part([self._new(x) for x in inputs])
        self.parts.append(part)
        if any(map(_unlike_memory, inputs)) or len(self._borrowed) < len(inputs):
            self.failure = "an operand is not plain memory, or shares it"
        with self, Exposure(self._note_exposure, self._note_list):
            outputs = work()
        if self.failure is None and any(self._is_written_unseen(x()) for x in self._made_tensors):
            self.failure = "something wrote into a tensor unseen, on another thread for instance"
        if self.failure is None and sum(x.numel() * x.itemsize for x in outputs) > _MOST_BYTES:
            self.failure = "the outputs are too large to be compared"
        if self.failure is None:
            part.outputs = [self._slot(x) for x in outputs]
            part.results = [Result(x) for x in outputs]
        self._slots = {key: slot for key, slot in self._slots.items() if key[0] not in self._borrowed}
        self._known = {address: n for address, n in self._known.items() if address not in self._borrowed}
        self._borrowed = set()
        return outputs

    def higher_order_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.failure = self.failure or f"{func} is no aten op"
        return func(*args, **kwargs)

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        with DisableTorchFunction():  # what an op does within, it does in every run
            return func(*args, **kwargs) if self.failure is not None else self._op(func, args, kwargs)

    def _note_list(self, tensor: torch.Tensor, values: Any) -> None:
        """Python is given values past torch's dispatcher."""
        if self.failure is None:
            with DisableTorchFunction():
                self._note_value(torch.Tensor.tolist, ((self._slot(tensor),), {}), values)

    def _note_exposure(self, tensors: Iterable[torch.Tensor]) -> None:
        self.failure = self.failure or "memory is handed out, past torch's dispatcher"

    def _op(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _SET and storage_of(args[0]) not in self._borrowed:
            return self._set(func, args)
        arguments = bound(func, args, kwargs)
        op = _PLAIN.get(func, func)
        targets = list(written(func, arguments)) if op is func else []
        self.failure = self._why_not(func, arguments, targets)
        if self.failure is not None:
            return func(*args, **kwargs)
        given = torch_pytree.tree_map_only(torch.Tensor, self._slot, (args, kwargs))
        before = [memory_key(x) for x in targets]
        try:
            output = func(*args, **kwargs)
        except Exception:
            self.failure = f"{func} refuses the values of its operands, and who called it knows what to do"
            raise
        if [memory_key(x) for x in targets] != before:
            self.failure = f"{func} changes the memory of a tensor"
            return output
        if reads_values(op):
            self._note_value(func._op, given, output)
            return output
        self._note(op, given, output, writes=bool(targets))
        self._written |= {storage_of(x) for x in targets}
        return output

    def _set(self, func: Any, args: Any) -> torch.Tensor:
        """A tensor becomes a view of memory, as the weights of cuDNN's recurrent layers do: written down as a view."""
        target = func(*args)
        self._made_tensors = [x for x in self._made_tensors if x() is not target]
        address = storage_of(target)
        base = next((slot for key, slot in self._slots.items() if key[:2] == (address, target.dtype)), None)
        if base is None:
            self._slot(target)  # a constant, unless an op made it as something else
        elif memory_key(target) not in self._slots:
            view = (base, list(target.shape), list(target.stride()), target.storage_offset())
            slot, grad_mode = self._new(target), torch.is_grad_enabled()
            self.parts[-1].steps.append(Step(_VIEW, view, {}, [slot], _ONE, False, False, grad_mode))
        return target

    def _is_written_unseen(self, tensor: torch.Tensor | None) -> bool:
        if tensor is None or tensor.is_inference():
            return False
        return tensor._version > 0 and storage_of(tensor) not in self._written

    def _why_not(self, op: Any, arguments: dict[str, Any], targets: list[torch.Tensor]) -> str | None:
        if draws(op, arguments):
            return f"{op} draws random numbers"
        if any(isinstance(x, torch.Generator) for x in arguments.values()):
            return f"{op} takes a generator"
        if _depends_on_values(op, arguments):
            return f"{op} depends on values"
        if any(_unlike_memory(x) for x in torch_pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)):
            return f"{op} has an operand that is not plain memory"
        if any(storage_of(x) not in self._made for x in targets):
            return f"{op} writes into a tensor from outside"
        return None

    def _note_value(self, function: Any, given: tuple[Any, Any], value: Any) -> None:
        step = Step(function, *given, [], None, False, True, torch.is_grad_enabled(), value)
        self.parts[-1].steps.append(step)

    def _note(self, op: Any, given: tuple[Any, Any], output: Any, *, writes: bool) -> None:
        if op in _OF_GEOMETRY:
            return
        outs, structure = torch_pytree.tree_flatten(output)
        if not all(map(_may_be_returned, outs)):
            self.failure = f"{op} returns what is no tensor of plain memory"
            return
        outs = [out if isinstance(out, torch.Tensor) else None for out in outs]
        new = [out for out in outs if out is not None and storage_of(out) not in self._known]
        self._made |= {storage_of(out) for out in new}
        self._made_tensors += map(weakref.ref, new)
        results = [None if out is None or memory_key(out) in self._slots else self._new(out) for out in outs]
        if len(self.parts[-1].steps) == _MOST_STEPS:
            self.failure = "there are too many ops"
        elif writes or any(results) or checks(op):
            grad_mode = torch.is_grad_enabled()
            self.parts[-1].steps.append(Step(op, *given, results, structure, writes, checks(op), grad_mode))

    def _slot(self, tensor: torch.Tensor) -> Slot:
        """The slot of a tensor; a constant gets one when it is first met."""
        key = memory_key(tensor)
        if key in self._slots:
            return self._slots[key]
        if storage_of(tensor) in self._known:
            self.failure = "a view was made past torch's dispatcher"
        slot = self._new(tensor)
        self.constants[slot.number] = tensor.detach()
        return slot

    def _new(self, tensor: torch.Tensor) -> Slot:
        slot = self._slots[memory_key(tensor)] = Slot(len(self.memory))
        address = storage_of(tensor)
        if address not in self._known:
            self._known[address] = self._n_storages
            self._n_storages += 1
            if address not in self._borrowed:
                self._seen.append(StorageWeakRef(tensor.untyped_storage()))
        self.memory[slot.number] = Memory.of(tensor, self._known[address])
        return slot


@functools.cache
def checks(op: Any) -> bool:
    """Whether an op may refuse the values of its operands, apart from what it returns: some do nothing else."""
    if not op._schema.returns or op in _ASSERTIONS:
        return True
    name = op.overloadpacket.__name__.lstrip("_")
    return name.startswith("linalg_") or any(argument.name in _LOOKED_UP for argument in op._schema.arguments)


def _depends_on_values(op: Any, arguments: dict[str, Any]) -> bool:
    """Whether the values of its operands decide on the shape of what an op returns."""
    if op is _aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in arguments["indices"])
    is_dependent = torch.Tag.data_dependent_output in op.tags and not reads_values(op)
    return is_dependent or torch.Tag.dynamic_output_shape in op.tags


_aten = torch.ops.aten
_SET, _VIEW = (_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset), _aten.as_strided.default
_ONE = torch_pytree.tree_structure(0)
_ASSERTIONS = {
    _aten._functional_assert_async.msg,
    _aten._functional_assert_scalar.default,
    _aten._functional_sym_constrain_range.default,
    _aten._functional_sym_constrain_range_for_size.default,
}
"""Ops that return a token for their order only."""
_LOOKED_UP = {"index", "indices", "target", "targets", "offsets"}
"""How schemas call operands whose values must lie in a range."""
_OF_GEOMETRY = {_aten.is_same_size.default, _aten._has_same_storage_numel.default}
"""Ops that ask for shapes alone, which stay the same."""

_PLAIN = {  # ops whose effect is more than memory, and those that do as much with memory
    _aten.as_strided_.default: _aten.as_strided.default,
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.t_.default: _aten.t.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
}


def _may_be_returned(value: Any) -> bool:
    """Nothing, a tensor of plain memory, or a number that follows from shapes, as the longest row of a batch."""
    return not _unlike_memory(value) if isinstance(value, torch.Tensor) else value is None or isinstance(value, int)


def _unlike_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is more, or less, than memory with a geometry."""
    return not is_plain(tensor) or tensor.is_complex() or tensor.is_neg()
