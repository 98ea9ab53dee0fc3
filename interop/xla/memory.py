"""Which value each tensor has, while others may be views of its memory and ops write into it.

Memory is one value, that of the tensor it was made for. After a write into a part of it, that value is another one,
and tensors that view it are read from it anew: so in-place ops and views become functions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import TorchCallError
from .windows import Places, Strided

Geometry = tuple[tuple[Any, ...], tuple[Any, ...], Any]


@dataclass
class _Storage:
    sides: list[int]
    """Its value, once with the derivative that it has for tensors which share it in autograd, once for each tensor that
    was detached: `x.data`."""
    base: torch.Tensor
    version: int = 0
    views: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Held:
    """A tensor with the value that it had when it was last asked for."""

    tensor: torch.Tensor
    value: int
    storage: _Storage
    version: int

    def is_current(self, storage: _Storage) -> bool:
        """Whether it has that value still: it lies where it did (`x.data = y`), and nothing was written there."""
        return self.storage is storage and self.version == storage.version


class Memory:
    """The values of tensors.

    **Arguments:**

    - `storage_of`: tells the storage that a tensor lies in.
    - `constant`: makes a value of a tensor that is not fake.
    - `window`: makes the value of a view: of a value and the positions in it that the view shows.
    - `put`: makes the value that one has after another one was put at positions of it.
    - `stop`: makes a value of one that passes no derivative.
    - `keep`: makes a value that is a new one, with the derivative of an old one.
    """

    def __init__(
        self,
        storage_of: Callable[[torch.Tensor], int],
        constant: Callable[[torch.Tensor], int],
        window: Callable[[int, Places, torch.Tensor], int],
        put: Callable[[int, int, Places, torch.Tensor], int],
        stop: Callable[[int, torch.Tensor], int],
        keep: Callable[[int, int, torch.Tensor], int],
    ):
        self._storage_of = storage_of
        self._constant, self._window, self._put, self._stop, self._keep = constant, window, put, stop, keep
        self._storages: dict[int, _Storage] = {}
        self._tensors: dict[int, _Held] = {}  # held, so that no id is used again
        self._sides: dict[int, int] = {}  # of tensors by their ids; what is not here is on the first

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory has a value here; if not, it is a constant."""
        return self._storage_of(tensor) in self._storages

    def add(self, tensor: torch.Tensor, value: int) -> None:
        """A tensor that an op returned, with its value."""
        storage = self._storages.setdefault(self._storage_of(tensor), _Storage([value], tensor))
        self._note(tensor, value, storage)

    def add_view(self, tensor: torch.Tensor, value: int, sources: Iterable[torch.Tensor], *, detached: bool) -> None:
        """The same for one that may be a view of its sources; to autograd one that is detached is another tensor."""
        storage = self._storages.get(self._storage_of(tensor))
        if storage is not None:
            viewed = next((x for x in sources if self._storage_of(x) == self._storage_of(tensor)), None)
            side = 0 if viewed is None else self.side_of(viewed)
            if detached:
                storage.sides.append(self._stop(storage.sides[side], storage.base))
                side = len(storage.sides) - 1
            self._sides[id(tensor)] = side
        self.add(tensor, value)

    def _note(self, tensor: torch.Tensor, value: int, storage: _Storage) -> None:
        if id(tensor) not in self._tensors:
            storage.views.append(id(tensor))
        self._tensors[id(tensor)] = _Held(tensor, value, storage, storage.version)

    def read(self, tensor: torch.Tensor) -> int:
        """The value of a tensor."""
        storage = self._storages.get(self._storage_of(tensor))
        if storage is None:
            return self._constant(tensor)
        held = self._tensors.get(id(tensor))
        if held is not None and held.is_current(storage):
            return held.value
        value = self._seen(storage, storage.sides[self.side_of(tensor)], tensor)
        self._note(tensor, value, storage)
        return value

    def side_of(self, tensor: torch.Tensor) -> int:
        """Which side of its memory it is on."""
        return self._sides.get(id(tensor), 0)

    def on_side(self, tensor: torch.Tensor, side: int) -> int:
        """The value of what a tensor shows of its memory."""
        storage = self._storages[self._storage_of(tensor)]
        return self._seen(storage, storage.sides[side], tensor)

    def read_sides(self, tensor: torch.Tensor) -> list[int]:
        """Its value on every side of its memory."""
        storage = self._storages[self._storage_of(tensor)]
        return [self._seen(storage, value, tensor) for value in storage.sides]

    def _seen(self, storage: _Storage, value: int, tensor: torch.Tensor) -> int:
        return value if _is_whole(storage, tensor) else self._window(value, self._places(storage, tensor), tensor)

    def write(self, tensor: torch.Tensor, value: int, *, keeps: bool, fills: bool) -> None:
        """The tensor has a new value, and so have those that share its memory.

        With `keeps`, without gradients, it has its old derivative: to torch's autograd it is the same as before. With
        `fills`, all its elements are the same.
        """
        storage, own = self._storages[self._storage_of(tensor)], self.side_of(tensor)
        new, apart = value, list[_Held]()
        if not _is_whole(storage, tensor):
            places = self._places(storage, tensor)
            if not fills and _overlaps(tensor, places):
                raise TorchCallError(_OVERLAPS)
            apart = [] if isinstance(places, Strided) else self._apart(storage, tensor)
            new = self._put(storage.sides[own], value, places, storage.base)
        for side, old in enumerate(storage.sides):
            is_same = side == own and not keeps
            storage.sides[side] = new if is_same else self._keep(old, new, storage.base)
        storage.version += 1
        for held in apart:  # such as the other parts of a tensor that was split
            self._note(held.tensor, held.value, storage)
        if not keeps:
            self._note(tensor, value, storage)

    def _apart(self, storage: _Storage, tensor: torch.Tensor) -> list["_Held"]:
        """The tensors of a storage whose values are known, and that share no element with another one."""
        own = _offsets_of(tensor)
        return [held for held in self._current(storage) if not np.isin(_offsets_of(held.tensor), own).any()]

    def _current(self, storage: _Storage) -> list["_Held"]:
        """The tensors of a storage whose values are known, but for large ones."""
        every = (self._tensors[i] for i in storage.views)
        return [held for held in every if held.is_current(storage) and held.tensor.numel() <= _MOST_COMPARED]

    def adopt(self, whole: torch.Tensor, value: int) -> None:
        """A constant's memory, in which something unknown was written: what it was before."""
        self._storages.setdefault(self._storage_of(whole), _Storage([value], whole))

    def overwrite(self, tensor: torch.Tensor, value: int) -> None:
        """A tensor to which an op gave another shape has a new value."""
        storage, own = self._storages[self._storage_of(tensor)], self.side_of(tensor)
        sides = range(len(storage.sides))
        self.replace(tensor, [value if side == own else self._stop(value, tensor) for side in sides])

    def replace(self, whole: torch.Tensor, sides: list[int]) -> None:
        """All that is in the memory of a tensor has new values, one on each side."""
        storage = self._storages[self._storage_of(whole)]
        storage.base, storage.sides, storage.version = whole, sides, storage.version + 1

    def _places(self, storage: _Storage, tensor: torch.Tensor) -> Places:
        """Where in the flat value of a storage the elements of a tensor are."""
        if tensor.dtype != storage.base.dtype or tensor.is_conj() or tensor.is_neg():
            raise TorchCallError(
                f"it writes into memory that a tensor of {tensor.dtype} and one of {storage.base.dtype} share, which "
                "engine='xla' cannot follow. Clone the view before the write, or use engine='torch'."
            )
        if _is_symbolic(storage.base) or _is_symbolic(tensor):
            if not (storage.base.is_contiguous() and storage.base.storage_offset() == 0):
                raise TorchCallError(
                    "it writes into a view of a tensor that has symbolic sizes and does not lie in memory in order. "
                    "Call `.contiguous()` before, or export with sizes that are known, once for each size."
                )
            return Strided(*_geometry(tensor))
        base = _offsets(_geometry(storage.base)).ravel()
        places = np.full(max(base.max(initial=-1), _offsets(_geometry(tensor)).max(initial=-1)) + 1, -1)
        places[base] = np.arange(base.size)
        found = np.asarray(places[_offsets(_geometry(tensor))])
        if found.size and found.min() < 0:
            raise TorchCallError(
                "it has a view by strides of memory in which no tensor has been. Use a contiguous tensor before "
                "`as_strided`, or engine='torch'."
            )
        return found


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All that is in a tensor's memory."""
    length = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((length,), (1,), 0)


_MOST_COMPARED = 2**20
_OVERLAPS = (
    "it writes into a tensor of which more than one element refers to a single memory location, as those of "
    "`x.expand(...)` do; most of torch's kernels refuse that. Clone the tensor before the write."
)


def _overlaps(tensor: torch.Tensor, places: Places) -> bool:
    """Whether elements of a tensor lie where others do."""
    if isinstance(places, Strided):
        return any(isinstance(s, int) and s == 0 for s in tensor.stride())
    return places.size <= _MOST_COMPARED and np.unique(places).size < places.size


def _offsets_of(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(_offsets(_geometry(tensor)))


def _is_whole(storage: _Storage, tensor: torch.Tensor) -> bool:
    return _geometry(tensor) == _geometry(storage.base) and tensor.dtype == storage.base.dtype


def _geometry(tensor: torch.Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()


def _is_symbolic(tensor: torch.Tensor) -> bool:
    shape, strides, offset = _geometry(tensor)
    return any(isinstance(n, torch.SymInt) for n in (*shape, *strides, offset))


def _offsets(geometry: Geometry) -> np.ndarray:
    shape, strides, offset = geometry
    found: Any = np.full(shape, offset)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        found = found + (np.arange(size) * stride).reshape(_along(axis, len(shape)))
    return found


def _along(axis: int, ndim: int) -> Sequence[int]:
    return [-1 if i == axis else 1 for i in range(ndim)]
