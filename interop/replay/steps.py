"""What a recording consists of: ops on numbered tensors, and where those lie."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..internals.ops import torch_pytree
from ..values.memory import fills_storage

NOTHING = object()


@dataclass(frozen=True)
class Slot:
    """A tensor of a recording, by its number."""

    number: int


@dataclass(frozen=True)
class Memory:
    """Where a tensor lies."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_bytes: int
    is_filled: bool
    """Whether the tensor, contiguous, is all that the storage holds."""

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int) -> "Memory":
        """That of a tensor, whose storage has this number."""
        n_bytes = tensor.numel() * tensor.itemsize
        is_filled = tensor.numel() > 0 and fills_storage(tensor)
        return cls(storage, tensor.dtype, tuple(tensor.shape), n_bytes, is_filled)


@dataclass
class Step:
    """One op: its arguments, with slots in the place of tensors, and the slots of what it returns.

    `results` are the leaves of that, `structure` is the tree: some ops return lists in tuples.
    """

    op: Any
    args: Any
    kwargs: Any
    results: list[Slot | None]
    """None for what is no new tensor."""
    structure: Any
    writes: bool
    checks: bool
    """Whether it may refuse the values of its operands, so that it counts though nobody uses what it returns."""
    grad_mode: bool
    """Whether gradients are enabled: some ops ask."""
    read: Any = NOTHING
    """The value that it gave to Python: with another one, Python might go elsewhere."""

    @property
    def made(self) -> Slot | None:
        """The one tensor it makes, if it does nothing else."""
        is_one = self.structure is not None and self.structure.is_leaf()
        return self.results[0] if is_one and not self.writes else None

    def operands(self) -> set[int]:
        """The slots it reads, or writes into."""
        return {x.number for x in torch_pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Slot)}

    def slots(self) -> set[int]:
        """The slots it has to do with."""
        return self.operands() | {slot.number for slot in self.results if slot}


@dataclass
class Part:
    """The ops of one run, or of the forward or backward half of one."""

    inputs: list[Slot]
    steps: list[Step] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    results: "list[Result]" = field(default_factory=list)
    """What the outputs were."""


_LARGE = 2**20  # bytes


class Result:
    """What an output was, until a replay has been compared with it; in the host's memory if it is large, as the GPU's
    may be needed."""

    def __init__(self, output: torch.Tensor):
        self.is_on_gpu, output = output.is_cuda, output.detach()
        to_host = self.is_on_gpu and output.nbytes >= _LARGE
        contiguous = torch.contiguous_format
        self._copy = output.to("cpu", memory_format=contiguous) if to_host else output.clone(memory_format=contiguous)
        self._device = output.device

    def empty(self) -> torch.Tensor:
        """Memory for another run's."""
        return torch.empty_like(self._copy, device=self._device)

    def value(self) -> torch.Tensor:
        """It, where it was."""
        return self._copy.to(self._device)
