"""Fake tensors, and real ones among them: what depends on no operand is computed, so that its values can be read.

A real tensor that a trace meets is a constant: captured from outside, or made here of others by ops and factories that
give the same each time. Ops on constants alone run for real. Where a constant meets a fake tensor, a fake one of its
geometry takes its place. Memory of a constant made here is given up when something unknown is written into it, so that
nothing can read it any more, not even past torch's dispatcher.

Source: [FakeTensorMode](https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/torch.compiler_fake_tensor.html).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

from ..internals.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from ..internals.memory import throw_on_writes
from ..internals.ops import OpOverload, torch_pytree
from ..values.memory import is_plain, storage_of
from .aten import bound, reads_values, tensors_in, written

_MOST_MADE = 2**20
"""Elements of a constant that is made here."""
_MOST_READ = 2**24
"""Elements of a constant that is read to make one."""
_MOST_MULTIPLIED = 2**16
"""The same for products of matrices and the like."""

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)

_aten = torch.ops.aten
_FACTORIES = {
    *("arange", "eye", "full", "linspace", "logspace", "ones", "scalar_tensor", "zeros"),
    *("tril_indices", "triu_indices", "full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros"),
}
"""Ops whose results follow from their arguments and, at most, from the geometry of a tensor."""
_SHAPED_BY = {
    _aten.index.Tensor: "indices",
    _aten.masked_select.default: "mask",
    _aten._pack_padded_sequence.default: "lengths",
}
"""Ops of whose operands some decide, by their values, about the shapes of the results."""


@dataclass(frozen=True)
class Failure:
    """An exception that an op raised, without the frames that hold its operands."""

    kind: type[Exception]
    words: str
    op: Any
    is_question: bool
    """Whether the op was to give Python a bool."""

    @property
    def reads_values(self) -> bool:
        """Whether the op gives values to Python."""
        return issubclass(self.kind, DataDependentOutputException)

    @property
    def makes_shapes(self) -> bool:
        """Whether values decide about the shape of what the op makes."""
        return issubclass(self.kind, DynamicOutputShapeException)


def _is_question(op: Any, args: Any) -> bool:
    if op is _aten._local_scalar_dense.default:
        return args[0].dtype is torch.bool
    return reads_values(op) and str(op._schema.returns[0].type) == "bool"


class KnownConstants(FakeTensorMode):
    """A fake tensor mode that computes with constants.

    With `answers`, the values that ops gave to Python in another run, in their order, it goes where that run went. With
    `sizes`, torch's environment of symbols, tensors may have sizes that are not known.
    """

    supports_higher_order_operators = True

    def __init__(self, answers: Sequence[Any] = (), sizes: Any = None) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=sizes)
        self._answers = answers
        self.reads: list[Any] = []
        """The values that ops gave to Python so far."""
        self.failure: Failure | None = None
        """The first one: what the callable, or torch's interpreter, makes of it tells less."""
        self.read_captured = False
        """Whether a value was read that follows from a captured tensor, which may be another one later."""
        self._storages: list[StorageWeakRef] = []  # addresses of those that are numbered here are not used again
        self._made: set[int] = set()
        self._of_captured: set[int] = set()
        self._unknown: set[int] = set()  # those into which something unknown was written
        self._substitutes: dict[Any, torch.Tensor] = {}
        self._memories: dict[int, torch.Tensor] = {}  # for storages that are unknown: all of it, fake
        self._real: dict[int, int] = {}  # and which storages those stand for

    def is_captured(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is neither fake nor made here."""
        return not self.is_our_fake(tensor) and storage_of(tensor) not in self._made

    def storage_behind(self, tensor: torch.Tensor) -> int:
        """The address of a tensor's storage; of a fake one that stands for that of a constant, the constant's."""
        address = storage_of(tensor)
        return self._real.get(address, address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            if not isinstance(func, OpOverload):
                return self._higher_order(func, types, args, kwargs)
            tensors = list(tensors_in(*args, *kwargs.values()))
            if reads_values(func):
                return self._read(func, types, tensors, args, kwargs)
            if all(map(self.is_known, tensors)) and self._is_computed(func, tensors, args, kwargs):
                return self._compute(func, tensors, args, kwargs)
            if self._is_shaped_by_constants(func, args, kwargs):
                return self._shape(func, args, kwargs)
            return self._fake(func, types, args, kwargs)
        except Exception as exc:
            self.failure = self.failure or Failure(type(exc), str(exc), func, _is_question(func, args))
            raise

    def _read(self, func: Any, types: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """What an op gives to Python: by its operands, if they are known, or else what the other run read here."""
        is_known, n = all(map(self.is_known, tensors)), len(self.reads)
        if is_known and self._is_computed(func, tensors, args, kwargs):
            value = self._compute(func, tensors, args, kwargs)
        elif not is_known and n < len(self._answers):
            value = self._answers[n]
        else:
            value = self._fake(func, types, args, kwargs)
        self.reads.append(value)
        return value

    # --- constants ---

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has values that can be read."""
        return is_plain(tensor) and storage_of(tensor) not in self._unknown

    def _is_computed(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> bool:
        """Whether an op on constants alone is carried out."""
        if torch.Tag.nondeterministic_seeded in func.tags or self._has_sizes((args, kwargs)):
            return False
        if any(storage_of(x) not in self._made for x in written(func, bound(func, args, kwargs))):
            return False
        if func is _aten.lift_fresh.default:  # of what Python or NumPy made
            return tensors[0].numel() <= _MOST_MADE
        if not tensors and func.overloadpacket.__name__ not in _FACTORIES:
            return False
        largest = max((x.numel() for x in tensors), default=0)
        if largest > (_MOST_MULTIPLIED if func.overloadpacket in flop_registry else _MOST_READ):
            return False
        return (bool(tensors) and largest**2 <= _MOST_MADE) or self._is_small(func, args, kwargs)

    def _has_sizes(self, tree: Any) -> bool:
        """Whether there are sizes that are not known among arguments."""
        return self.shape_env is not None and any(isinstance(x, _SIZES) for x in torch_pytree.tree_leaves(tree))

    def _is_small(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the results of an op on constants are."""
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            return True  # as large as its operands, at most
        args, kwargs = torch_pytree.tree_map_only(torch.Tensor, self._substitute, (args, kwargs))
        outs = super().__torch_dispatch__(func, (), args, kwargs)
        return all(x.numel() <= _MOST_MADE for x in tensors_in(outs))

    def _compute(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        of_captured = any(self.is_captured(x) or storage_of(x) in self._of_captured for x in tensors)
        given = set(map(storage_of, tensors))
        if func is _aten.lift_fresh.default:
            is_numpys = not tensors[0].untyped_storage().resizable()  # it may write into its memory
            func, of_captured, given = (_aten.clone.default if is_numpys else func), is_numpys, set()
        outs = func(*args, **kwargs)
        for out in tensors_in(outs):
            if storage_of(out) not in given:
                self._note(out, self._made)
                if of_captured:
                    self._note(out, self._of_captured)
        self.read_captured |= of_captured and torch.Tag.data_dependent_output in func.tags
        return outs

    def _note(self, tensor: torch.Tensor, where: set[int]) -> None:
        where.add(storage_of(tensor))
        self._storages.append(StorageWeakRef(tensor.untyped_storage()))

    # --- fake tensors ---

    def _fake(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What an op returns where not all is known."""
        if func.overloadpacket.__name__ in _FACTORIES and args:
            known = self._factory(func, args, kwargs)
            if known is not None:
                return known
        targets = [x for x in written(func, bound(func, args, kwargs)) if is_plain(x)]
        given = {id(x): self._new_substitute(x) for x in targets}
        back = {id(substitute): x for x, substitute in zip(targets, given.values(), strict=True)}
        args, kwargs = torch_pytree.tree_map_only(
            torch.Tensor, lambda x: given[id(x)] if id(x) in given else self._substitute(x), (args, kwargs)
        )
        outs = super().__torch_dispatch__(func, types, args, kwargs)
        for target in targets:
            if given[id(target)].shape != target.shape:
                raise UnsupportedFakeTensorException(f"{func} gives a constant another shape")
            self._forget(target)
        return torch_pytree.tree_map_only(torch.Tensor, lambda x: back.get(id(x), x), outs) if back else outs

    def _factory(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a factory makes in the likeness of a fake tensor."""
        like, *others = args
        if not isinstance(like, torch.Tensor) or like.layout != torch.strided or self._has_sizes((args, *like.shape)):
            return None
        if like.numel() > _MOST_MADE:
            return None
        if not self._is_small(func, args, kwargs):
            return None
        real = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return self._compute(func, [], (real, *others), kwargs)

    def _forget(self, tensor: torch.Tensor) -> None:
        """Something unknown is written into a constant."""
        address = storage_of(tensor)
        if address in self._unknown:
            return
        self._note(tensor, self._unknown)
        length = tensor.untyped_storage().nbytes() // tensor.itemsize
        flat = tensor.detach().as_strided((length,), (1,), 0)
        self._memories[address] = self._new_substitute(flat)
        self._real[storage_of(self._memories[address])] = address
        if address in self._made:
            storage = tensor.untyped_storage()
            throw_on_writes(tensor)
            storage.resize_(0)

    def _substitute(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor in the place of a constant; one without values serves for all of the same geometry."""
        if not is_plain(tensor):
            return tensor
        memory = self._memories.get(storage_of(tensor))
        if memory is not None and memory.dtype == tensor.dtype:
            geometry = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
            return super().__torch_dispatch__(_aten.as_strided.default, (), (memory, *geometry), {})  # pyright: ignore[reportReturnType]
        key = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if key not in self._substitutes:
            self._substitutes[key] = self._new_substitute(tensor)
        return self._substitutes[key]

    def _new_substitute(self, tensor: torch.Tensor) -> torch.Tensor:
        options = {"dtype": tensor.dtype, "device": tensor.device}
        geometry = (list(tensor.shape), list(tensor.stride()))
        return super().__torch_dispatch__(_aten.empty_strided.default, (), geometry, options)  # pyright: ignore[reportReturnType]

    # --- shapes that follow from constants ---

    def _is_shaped_by_constants(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func not in _SHAPED_BY:
            return False
        deciding = list(tensors_in(bound(func, args, kwargs)[_SHAPED_BY[func]]))
        if func is _aten.index.Tensor and all(x.dtype not in (torch.bool, torch.uint8) for x in deciding):
            return False
        return all(map(self.is_known, deciding))

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op on zeros in the place of what is unknown, and nothing but the shapes of what it gives."""

        def real(tensor: torch.Tensor) -> torch.Tensor:
            if self.is_known(tensor):
                return tensor
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)

        args, kwargs = torch_pytree.tree_map_only(torch.Tensor, real, (args, kwargs))
        outs = func(*args, **kwargs)
        if func is _aten._pack_padded_sequence.default:
            self._note(outs[1], self._made)  # the sizes of the batches follow from the lengths alone
            return self._new_substitute(outs[0]), outs[1]
        return torch_pytree.tree_map_only(torch.Tensor, self._new_substitute, outs)

    # --- higher-order ops ---

    def _higher_order(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        rule = func.python_key_table.get(FakeTensorMode)
        return super().__torch_dispatch__(func, types, args, kwargs) if rule is None else rule(self, *args, **kwargs)
