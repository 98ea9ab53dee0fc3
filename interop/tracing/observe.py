"""One run of a torch callable, watched: what it returns, writes into, draws and leaves behind."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..calls.cycles import free_circular_graphs
from ..errors import CapturedWriteError, ForeignTensorError, StateError, TorchCallError, signature_text
from ..internals.autograd_thread import meet_autograd
from ..internals.fake import FakeTensor
from ..internals.ops import DisableTorchFunction, lacks_autograd, torch_pytree
from ..modes import kernels
from ..modes.aten import bound, in_checkpoint, in_reentrant_checkpoint, reads_values, tensors_in, written
from ..modes.dispatch import Mode
from ..modes.flops import flops_of
from ..modes.guard import Exposure
from ..modes.known import KnownConstants
from ..modes.own_gradients import Asked, wants_gradients
from ..modes.random import draws, refuse
from ..types import Aval, Checkpoints
from ..values.dtypes import is_inexact_tensor, precision_of
from ..values.memory import fills_storage, has_storage, memory_key, storage_of
from .outputs import describe
from .traceable import Flat, Traceable


@dataclass(frozen=True)
class Observation:
    """What one run did."""

    treedef: Any
    leaves: tuple[Any, ...]
    """Output leaves: an `Aval` for each tensor, the value itself for static ones."""
    mutated: frozenset[int]
    """Operands it wrote into."""
    state: tuple[int, ...]
    """State operands of which it left new values."""
    restored: frozenset[int]
    """State operands in whose place it put what has their own value."""
    fused_kernels: frozenset[str]
    """The fused kernels it used that have replacements (`kernels.py`)."""
    flops: float
    """How many floating-point operations it took, about (`flops.py`)."""
    random: bool
    """Whether it drew random numbers."""
    captures: bool
    """Whether it computed with tensors that are neither operands nor made by it."""
    checkpoints: Checkpoints
    """Whether it used `torch.utils.checkpoint`, and of which kind."""
    makes_shapes: bool
    """Whether an op made a tensor whose shape depended on values."""
    leaves_torch: bool
    """Whether it handed out the memory of a tensor, past torch's dispatcher."""
    reads: tuple[Any, ...]
    """The values that ops gave to Python."""
    host_random: frozenset[str] = frozenset()
    """Python's and NumPy's generators that it drew from."""
    differentiates: bool = False
    """Whether parameters have to require gradients in any case (`own_gradients.py`)."""
    precision: int = 8
    """The bytes of the least precise real number among what it computes, but for scalars."""
    without_autograd: frozenset[str] = frozenset()
    """Ops that it ran that have no kernel for autograd."""
    steps: int = field(default=0, compare=False)
    """Stands for the ops that it ran, one after another."""

    @property
    def output(self) -> tuple[Any, tuple[Any, ...]]:
        """The tree and leaves of what it returned."""
        return self.treedef, self.leaves

    @property
    def out_avals(self) -> tuple[Aval, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Aval))


def observe(
    traced: Traceable, operands: list[torch.Tensor], fake: KnownConstants | None = None, *, grad_mode: bool = True
) -> Observation:
    """Run once on operands, on fake ones within the mode `fake`; and again with parameters that require gradients, if
    that may change something. Empties `operands`.

    Raises `TorchCallError` where it does what no call may do, its own exceptions otherwise.
    """
    if not traced.trainable:
        return _observe_once(traced, operands, fake, grad_mode=grad_mode)
    spare = [x.clone() for x in operands] if fake is None else []
    found, asking = None, Asked()
    try:
        with asking:
            found = _observe_once(traced, operands, fake, grad_mode=grad_mode)
        if not asking.asked:
            return found
    except Exception as exc:
        if not (asking.asked or wants_gradients(exc)):
            raise
    spare = spare or [torch.empty(s, dtype=d, device=traced.device) for s, d in traced.specs]
    for i in traced.trainable:
        spare[i].requires_grad_(is_inexact_tensor(spare[i]))
    try:
        other = _observe_once(traced, spare, fake, grad_mode=grad_mode)
    except Exception:
        if found is None:
            raise
        return found  # as it is where gradients are off, which is all that it can do
    if found is not None and found.steps == other.steps and replace(other, flops=found.flops) == found:
        return found
    return replace(other, differentiates=True)


def _observe_once(
    traced: Traceable, operands: list[torch.Tensor], fake: KnownConstants | None, *, grad_mode: bool
) -> Observation:
    storages = [StorageWeakRef(x.untyped_storage()) for x in operands]
    watch = _Watch(traced, storages, fake)
    output, after = watch.run(traced.function, operands, grad_mode)
    treedef, leaves = describe(output, traced.name)
    mutated = watch.mutated | watch.changed_unseen(operands)
    state, restored = watch.changes(traced, operands, after)
    del output, after
    operands.clear()
    watch.forget()
    _refuse_escapes(traced, storages)
    return Observation(
        treedef,
        leaves,
        mutated=frozenset(mutated),
        state=tuple(i for i in traced.state_operands if i in state or i in mutated),
        restored=frozenset(restored - mutated),
        fused_kernels=frozenset(watch.fused_kernels),
        flops=watch.flops,
        random=watch.random,
        captures=watch.captures,
        checkpoints=watch.checkpoints,
        makes_shapes=watch.makes_shapes,
        leaves_torch=watch.leaves_torch,
        reads=tuple(watch.reads),
        precision=watch.precision,
        without_autograd=frozenset(watch.without_autograd),
        steps=watch.steps,
    )


def _refuse_escapes(traced: Traceable, storages: Sequence[StorageWeakRef]) -> None:
    if not all(s.expired() for s in storages) and traced.device.type == "cuda":
        meet_autograd(traced.device)  # its thread may hold a gradient that it returned
    if not all(s.expired() for s in storages):
        gc.collect()  # reference cycles are not escapes
    if not all(s.expired() for s in storages):
        free_circular_graphs({s.cdata for s in storages if not s.expired()})
    escaped = [x.name for x, s in zip(traced.operands, storages, strict=True) if not s.expired()]
    if escaped:
        raise TorchCallError(
            f"{traced.name} keeps argument {', '.join(escaped)} (or a view of it) after it returns: a closure, a "
            "global, a hook or an attribute still holds the tensor, whose memory belongs to XLA and is reused at once. "
            "Return the tensor as an output, or store `tensor.clone()`."
        )


def _check_state(traced: Traceable, state: dict[int, Any]) -> None:
    """A value that takes the place of another must be like it: programs and loops are compiled for one shape."""
    for i, value in state.items():
        shape, dtype = traced.specs[i]
        if not isinstance(value, torch.Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
            given = signature_text(["it"], [(value.shape, value.dtype)]) if isinstance(value, torch.Tensor) else value
            raise StateError(
                f"{traced.name} replaces `{traced.operands[i].name}` ({dtype}{list(shape)}) by {given}: state must "
                "keep its shape and dtype. Allocate a buffer of the final size, and write into it."
            )


class _Watch(Mode):
    """Sees every op with its schema: which operands it writes into, whether it is random."""

    def __init__(self, traced: Traceable, storages: Sequence[StorageWeakRef], fake: KnownConstants | None):
        super().__init__()
        self.mutated: set[int] = set()
        self.fused_kernels: set[str] = set()
        self.without_autograd: set[str] = set()
        self.flops = 0.0
        self.reads: list[Any] = []
        self.random = self.captures = self.makes_shapes = self.leaves_torch = False
        self.checkpoints: Checkpoints = "none"
        self.steps, self.precision = 0, 8
        self._name, self._fake, self._foreign = traced.name, fake, traced.foreign
        self._refusal: TorchCallError | None = None  # why the callable cannot be called
        self._storages = [s.cdata for s in storages]
        self._exposed: dict[int, torch.Tensor] = {}  # what operands were before their memory was handed out
        self._operands: Sequence[torch.Tensor] = ()
        self._key_remedy = None if traced.has_key else traced.key_remedy
        self._operand_of = {s.cdata: i for i, s in enumerate(storages)}
        self._copies: dict[int, int] = {}  # storages that hold the value of an operand
        self._made: dict[int, StorageWeakRef] = {}  # these and, of real ones, all that ops made

    def run(self, function: Flat, operands: Sequence[torch.Tensor], grad_mode: bool) -> tuple[Any, Sequence[Any]]:
        """What the callable returns."""
        self._operands = operands
        result: Any = None
        try:
            with self, Exposure(self._note_exposure, self._note_list), torch.set_grad_enabled(grad_mode):
                result = function(*operands)
        except TorchCallError:
            raise
        except Exception:
            if self._refusal is None:
                raise
        if self._refusal is not None:  # which the callable caught, or torch's interpreter made another error of
            raise self._refusal
        return result

    def forget(self) -> None:
        """Let go of the operands."""
        self._operands = ()
        self._exposed.clear()

    def changed_unseen(self, operands: Sequence[torch.Tensor]) -> set[int]:
        """Operands that changed past torch's dispatcher, or by `tensor.data = ...`."""
        pairs = zip(operands, self._storages, strict=True)
        replaced = {i for i, (x, storage) in enumerate(pairs) if storage_of(x) != storage}
        return replaced | {i for i, before in self._exposed.items() if not torch.equal(before, operands[i])}

    def changes(self, traced: Traceable, operands: Sequence[Any], after: Sequence[Any]) -> tuple[set[int], set[int]]:
        """State operands in whose place other values are, and those in whose place their own values are."""
        replaced = {i: x for i, x in zip(traced.state_operands, after, strict=True) if x is not operands[i]}
        restored = {i for i, x in replaced.items() if i not in self.mutated and self._is_copy(x, operands[i], i)}
        _check_state(traced, {i: x for i, x in replaced.items() if i not in restored})
        return replaced.keys() - restored, restored

    def _is_copy(self, value: Any, operand: torch.Tensor, i: int) -> bool:
        if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (operand.shape, operand.dtype):
            return False
        if memory_key(value) == memory_key(operand):
            return True
        return self._copies.get(storage_of(value)) == i and fills_storage(value)

    def higher_order_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.fused_kernels.add(kernels.HIGHER_ORDER)
        return super().higher_order_op(func, args, kwargs)

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        with DisableTorchFunction():  # to ask for a storage is no exposure
            return self._op(func, args, kwargs)

    def _op(self, func: Any, args: Any, kwargs: Any) -> Any:
        arguments = bound(func, args, kwargs)
        for tensor in tensors_in(*arguments.values()) if self._foreign else ():
            self._refuse_foreign(tensor)
        self.fused_kernels |= kernels.fused_kernels(func.name(), arguments)
        if lacks_autograd(func):
            self.without_autograd.add(func.name())
        if draws(func, arguments):
            if self._key_remedy is not None:
                raise self._refuse(refuse(self._name, func, self._key_remedy))
            self.random = True
        if self.checkpoints == "none" and in_checkpoint():
            self.checkpoints = "kept"
        elif self.checkpoints != "reentrant" and not torch.is_grad_enabled() and in_reentrant_checkpoint():
            self.checkpoints = "reentrant"
        if func not in _OF_AUTOGRAD:
            self.steps = hash((self.steps, func, *(x for x in args if isinstance(x, int | float))))
        for tensor in written(func, arguments):
            self._note_write(tensor)
        output = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, output)
        self._note_made(func, args, kwargs, output)
        if reads_values(func):
            self.reads.append(output)
        return output

    def _note_list(self, tensor: torch.Tensor, values: Any) -> None:
        """A tensor's values were read past torch's dispatcher; those of a fake tensor are, one by one, by ops."""
        if self._fake is None:
            self.reads += torch_pytree.tree_leaves(values)

    def _note_exposure(self, tensors: Iterable[torch.Tensor]) -> None:
        """The memory of tensors is handed out; it need not be that of an operand."""
        for tensor in filter(has_storage, tensors):
            operand = self._operand_of.get(storage_of(tensor))
            self.leaves_torch |= operand is not None or not self._is_captured(tensor)
            if operand is not None and self._fake is None:
                self._exposed.setdefault(operand, self._operands[operand].detach().clone())

    def _refuse_foreign(self, tensor: torch.Tensor) -> None:
        is_own = isinstance(tensor, FakeTensor) or not has_storage(tensor)
        what = None if is_own else self._foreign.get(storage_of(tensor))
        if what is not None:
            raise self._refuse(ForeignTensorError(self._name, tensor, what))

    def _note_write(self, tensor: torch.Tensor) -> None:
        if not has_storage(tensor):
            return
        storage = storage_of(tensor)
        self._copies.pop(storage, None)
        if storage in self._operand_of:
            self.mutated.add(self._operand_of[storage])
        elif self._is_captured(tensor):
            raise self._refuse(
                CapturedWriteError(
                    f"{self._name} writes into a tensor of shape {tuple(tensor.shape)} that is not an argument but "
                    "captured from outside, which a pure function must not. Pass it as an argument and return the "
                    "new value.",
                    tensor,
                )
            )

    def _is_captured(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) not in self._made if self._fake is None else self._fake.is_captured(tensor)

    def _note_made(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """What an op returned: memory of its own, a copy of an operand, a shape that values decided about."""
        given = [x for x in tensors_in(*args, *kwargs.values()) if has_storage(x)]
        self.captures |= any(storage_of(x) not in self._operand_of and self._is_captured(x) for x in given)
        storages = set(map(storage_of, given)) if func is not _LIFT else set()
        outs = [x for x in tensors_in(output) if has_storage(x)]
        self.precision = min(self.precision, precision_of(x for x in outs if x.ndim))
        for out in outs:
            storage = storage_of(out)
            if storage in storages:
                continue
            is_copy = func in _COPYING and out.dtype == given[0].dtype and fills_storage(given[0])
            if is_copy and storage_of(given[0]) in self._operand_of:
                self._copies[storage] = self._operand_of[storage_of(given[0])]
            if self._fake is None or storage in self._copies:  # so that its address is not used again
                self._made[storage] = StorageWeakRef(out.untyped_storage())
        self.makes_shapes |= torch.Tag.dynamic_output_shape in func.tags or (
            func is _INDEX and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
        )

    def _refuse(self, error: TorchCallError) -> TorchCallError:
        self._refusal = self._refusal or error
        return error


_aten = torch.ops.aten
_OF_AUTOGRAD = (torch.ops.prim.device.default, _aten.detach.default)
"""Ops that torch runs where tensors require gradients, to record them."""
_LIFT, _INDEX = _aten.lift_fresh.default, _aten.index.Tensor
_COPYING = {_aten.clone.default, _aten._to_copy.default}
