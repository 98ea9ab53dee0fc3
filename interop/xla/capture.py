"""Capture: a dispatch mode that writes down, as a graph, what a torch callable computes of fake tensors.

It sees the ops below torch's autograd and `torch.func`, after autocast: so gradients that the callable takes itself
are ops like others. An op that the table lacks is taken apart by torch's own decompositions; one that has none is
carried by torch. What follows from constants alone is computed (`known.py`), and is a constant of the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import torch
from torch.utils.checkpoint import CheckpointFunction

from ..errors import TorchCallError
from ..internals.fake import FakeTensor, without_modes
from ..internals.ops import DisableTorchFunction, decomposition_of, torch_pytree
from ..internals.transforms import transforms
from ..modes.aten import bound, reads_values, tensors_in
from ..modes.dispatch import Mode
from ..modes.known import KnownConstants
from ..modes.random import draws
from ..types import Aval
from . import table
from .applied import Applied, refuse_modules
from .constants import to_numpy
from .dtypes import to_jax
from .geometries import RESIZING, STRIDED, resized, strided
from .graph import Check, Graph, Node, Ref, Value
from .kept import in_place_of
from .memory import Memory, flat
from .names import functional_name, is_inplace_view, out_names, targets
from .products import with_plain_matrices
from .same_dtypes import refuse_other_dtypes
from .value_checks import statement
from .windows import Places, Strided, put, window

if TYPE_CHECKING:
    from .sizes import Sizes  # which loads more of torch, where it is needed

Carry = Callable[[Any, tuple[Any, ...], dict[str, Any], int, Sequence[Value]], Callable[..., Any]]


class Capture(Mode):
    """Within it, ops become nodes.

    **Arguments:**

    - `name`: the callable, for errors.
    - `operands`: the fake tensors that it is called with.
    - `avals`: what JAX has in their place.
    - `known`: the mode of the fake tensors.
    - `carry`: makes a function of JAX arrays of an op that torch is to compute.
    - `sizes`: those that are not known; None if all are.
    - `errors`: what the callable raises for other values than those that it is told, by the positions of these.
    """

    def __init__(
        self,
        name: str,
        operands: Sequence[torch.Tensor],
        avals: Sequence[Aval],
        known: KnownConstants,
        carry: Carry,
        sizes: "Sizes | None" = None,
        errors: Mapping[int, str] = MappingProxyType({}),
    ):
        super().__init__()
        self._name, self._known, self._carry, self._sizes, self._errors = name, known, carry, sizes, errors
        self._paused = False  # within a `torch.autograd.Function`
        self._records = False  # whether torch's autograd does, because code takes gradients
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._checks: list[Check] = []
        self._constants: dict[int, Any] = {}
        self._made_of: dict[Any, int] = {}
        self._kept: list[torch.Tensor] = []
        self.detaching = 0
        """How many calls of `Tensor.detach` are running."""
        self.memory = Memory(
            known.storage_behind, self._constant, self._window, self._put, self._stopped, self._kept_from
        )
        for tensor, aval in zip(operands, avals, strict=True):
            self.memory.add(tensor, self._new(aval, tensor.dtype))

    def graph(self, outputs: Sequence[torch.Tensor]) -> Graph:
        """What was written down, as far as outputs depend on it."""
        numbers = tuple(self.memory.read(x) for x in outputs)
        graph = Graph(self._values, self._constants, self._nodes, numbers, self._checks)
        return with_plain_matrices(graph).needed()

    # --- ops ---

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._paused:
            return func(*args, **kwargs)
        with DisableTorchFunction():
            return self._op(func, args, kwargs)

    def higher_order_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise TorchCallError(
            f"{self._name} uses the higher-order op {func}, which engine='xla' does not have. Use engine='torch'."
        )

    def _op(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(tensors_in(*args, *kwargs.values()))
        self._records |= any(x.requires_grad for x in tensors if self._is_unknown(x))
        if func in _IGNORED:
            return func(*args, **kwargs)
        if reads_values(func) or func in _ASSERTING:
            is_known = not any(map(self._is_unknown, tensors))
            return func(*args, **kwargs) if is_known else self._answered(func, args, kwargs)
        if func in RESIZING and self._is_unknown(args[0]):
            return resized(self.memory, self._internal, func, args, kwargs)
        if func in STRIDED and self._is_unknown(args[0]):
            return strided(self.memory, func, args, kwargs)
        if func is _CONJ:
            func = torch.ops.aten.conj_physical.default
        elif func is _NEG_VIEW:
            func = torch.ops.aten.neg.default
        name = functional_name(func)
        refuse_other_dtypes(name, func, args, kwargs)
        if name in _OF_MEMORY and not (args[0].is_contiguous() and args[0].storage_offset() == 0):
            raise TorchCallError(
                f"{self._name} uses {func} of a tensor that is not contiguous. Make it `.contiguous()`."
            )
        found = table.find(name)
        if found is None and any(map(self._is_unknown, tensors)):
            apart = self._decomposed(func, args, kwargs)
            if apart is not NotImplemented:
                return apart
        return self._recorded(func, args, kwargs, found)

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op gives to Python, which is assumed, or that it raises no error: a check of the graph."""
        position, reads, name = len(self._known.reads), reads_values(func), functional_name(func)
        question = statement(name)
        refuse_other_dtypes(name, func, args, kwargs)
        refs = self._with_refs((args, kwargs), func)
        answer = func(*args, **kwargs)  # raises where nothing is assumed
        assert question is not None, func
        value = self._new(Aval((), jnp.bool_), torch.bool)
        self._nodes.append(Node(name, question, *refs, (value,), stops=True))
        self._checks.append(Check(value, answer is not False, self._errors[position] if reads else _asserted(*args)))
        return answer

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        decomposition = decomposition_of(func)
        if decomposition is not None and not draws(func, bound(func, args, kwargs)):
            with self:
                return decomposition(*args, **kwargs)
        with self:
            return func.decompose(*args, **kwargs)

    def _recorded(self, func: Any, args: Any, kwargs: Any, found: table.Op | None) -> Any:
        written, places = targets(func, args, kwargs), out_names(func)
        given = (args, {k: v for k, v in kwargs.items() if found is None or k not in places})
        refs = self._with_refs(given, func) if written else None  # before values change
        before = [(x, *self._whole(x)) for x in written if not self._is_unknown(x)]
        shapes = [x.shape for x in written]
        result = func(*args, **kwargs)
        for target, whole, number in before:
            if not self._known.is_known(target):  # something unknown was written into a constant
                self.memory.adopt(whole, number)
        outs = [result] if isinstance(result, torch.Tensor) else list(tensors_in(result))
        into, sources = [x for x in written if self._is_unknown(x)], list(tensors_in(*args, *kwargs.values()))
        fresh = [x for x in outs if not any(x is target for target in written)]
        if not into and not any(map(self._is_unknown, fresh)):
            return result  # a constant, or nothing
        resized = {id(x) for x, shape in zip(written, shapes, strict=True) if x.shape != shape}  # `out=torch.empty(0)`
        self._add_node(func, refs or self._with_refs(given, func), found, fresh, into, sources, resized)
        return result

    def _add_node(
        self,
        func: Any,
        refs: Any,
        found: table.Op | None,
        fresh: list[torch.Tensor],
        into: list[torch.Tensor],
        sources: list[torch.Tensor],
        resized: set[int],
    ) -> None:
        args, kwargs = refs
        values = [self._new_like(x) for x in (*fresh, *into)]
        if found is None:
            function = self._carry(func, args, kwargs, len(fresh), self._values)
        else:
            function = _wanting(found, [self._values[v].aval for v in values])
        stops = not torch.is_grad_enabled() or (func is _DETACH and self._is_by_code())
        draws_key = found is not None and found.wants_key
        name, is_carried = functional_name(func), found is None
        self._nodes.append(Node(name, function, args, kwargs, tuple(values), stops, is_carried, draws_key))
        for tensor, value in zip(fresh, values, strict=False):
            self.memory.add_view(tensor, value, sources, detached=stops)
        for tensor, value in zip(into, values[len(fresh) :], strict=True):
            if is_inplace_view(func):
                self.memory.add(tensor, value)
            elif id(tensor) in resized:
                self.memory.overwrite(tensor, value)
            else:
                self.memory.write(tensor, value, keeps=not torch.is_grad_enabled(), fills=name in _FILLING)

    def _is_by_code(self) -> bool:
        """Whether code detaches, maybe torch's own in Python (`F.embedding`), and not autograd as it records."""
        return self.detaching > 0 or not (self._records or transforms())

    def apply(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """A `torch.autograd.Function`, whose derivative is its own: torch computes it, unless it met nothing fake."""
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if self._paused or not any(map(self._is_unknown, tensors)) or function is CheckpointFunction:
            return run(*args, **kwargs)
        refuse_modules(self._name, function, [*args, *kwargs.values()], self._is_unknown)
        outs, values, given, result = self._unseen(args, kwargs, run)
        name = f"torch.autograd.Function {function.__name__}"
        carried = self._carry(Applied(function), *given, len(outs), self._values)
        self._add_unseen(Node(name, carried, *given, tuple(values), not torch.is_grad_enabled(), is_carried=True), outs)
        return result

    def whole(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A function that is one node, however many ops torch makes of it."""
        found, tensors = table.find(name), list(tensors_in(*args, *kwargs.values()))
        if self._paused or found is None or any(x.requires_grad for x in tensors):
            return func(*args, **kwargs)
        outs, values, given, result = self._unseen(args, kwargs, func)
        function, stops = _wanting(found, [self._values[v].aval for v in values]), not torch.is_grad_enabled()
        self._add_unseen(Node(name, function, *given, tuple(values), stops, draws=found.wants_key), outs)
        return result

    def _unseen(
        self, args: Any, kwargs: Any, run: Callable[..., Any]
    ) -> tuple[list[torch.Tensor], list[int], tuple[Any, Any], Any]:
        """Run something whose ops become no nodes: the tensors of its result, their values, its arguments with refs."""
        given = self._with_refs((args, kwargs))
        self._paused = True
        try:
            result = run(*args, **kwargs)
        finally:
            self._paused = False
        outs = [result] if isinstance(result, torch.Tensor) else list(tensors_in(result))
        return outs, [self._new_like(x) for x in outs], given, result

    def _add_unseen(self, node: Node, outs: list[torch.Tensor]) -> None:
        self._nodes.append(node)
        for tensor, value in zip(outs, node.outs, strict=True):
            self.memory.add(tensor, value)

    # --- values ---

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) or self.memory.is_known(tensor)

    def _with_refs(self, given: tuple[Any, Any], func: Any = None) -> tuple[Any, Any]:
        """The arguments of an op with a `Ref` for each tensor, and with JAX's sizes."""
        args, kwargs = torch_pytree.tree_map_only(torch.Tensor, lambda x: Ref(self.memory.read(x)), given)
        return (args, kwargs) if self._sizes is None else self._sizes.arguments(func, args, kwargs)

    def _new(self, aval: Aval, dtype: torch.dtype) -> int:
        self._values.append(Value(aval, dtype))
        return len(self._values) - 1

    def _new_like(self, tensor: torch.Tensor) -> int:
        shape = tuple(tensor.shape) if self._sizes is None else self._sizes.in_jax(tensor.shape)
        return self._new(Aval(shape, to_jax(tensor.dtype)), tensor.dtype)

    def _constant(self, tensor: torch.Tensor) -> int:
        if isinstance(tensor, FakeTensor):
            raise TorchCallError(
                f"{self._name} computes with a tensor of shape {tuple(tensor.shape)}, and engine='xla' has seen no op "
                "that made it. Use engine='torch'."
            )
        with without_modes():
            key = (id(tensor), tensor._version, tuple(tensor.shape), tuple(tensor.stride()))
            if key not in self._made_of:
                number = self._new_like(tensor)
                self._constants[number] = to_numpy(tensor, self._values[number].aval.dtype)
                self._made_of[key] = number
                self._kept.append(tensor)
        return self._made_of[key]

    def _whole(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        """All that is in a constant's memory, as a tensor and as a value."""
        with without_modes():
            whole = flat(tensor)
        return whole, self._constant(whole)

    def _window(self, value: int, places: Places, like: torch.Tensor) -> int:
        places = self._in_jax(places)
        return self._internal("window", window(places, self._values[value].aval.shape), (Ref(value),), like)

    def _put(self, value: int, part: int, places: Places, like: torch.Tensor) -> int:
        places = self._in_jax(places)
        function = put(places, self._values[value].aval.shape)
        return self._internal("put", function, (Ref(value), Ref(part)), like)

    def _stopped(self, value: int, like: torch.Tensor) -> int:
        return self._internal("stop", jax.lax.stop_gradient, (Ref(value),), like)

    def _kept_from(self, old: int, new: int, like: torch.Tensor) -> int:
        return self._internal("keep", in_place_of, (Ref(old), Ref(new)), like)

    def _in_jax(self, places: Places) -> Places:
        if self._sizes is None or not isinstance(places, Strided):
            return places
        shape, strides = self._sizes.in_jax(places.shape), self._sizes.in_jax(places.strides)
        return Strided(shape, strides, self._sizes.size(places.offset))

    def _internal(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], like: torch.Tensor) -> int:
        number = self._new_like(like)
        self._nodes.append(Node(name, function, args, {}, (number,), stops=False))
        return number


def _wanting(found: table.Op, avals: Sequence[Aval]) -> Callable[..., Any]:
    """The function of an op, which is given the avals of its results if it wants them."""
    if not found.wants_out:
        return found.function
    out = avals[0] if len(avals) == 1 else tuple(avals)

    def function(*args: Any, **kwargs: Any) -> Any:
        return found.function(*args, out=out, **kwargs)

    return function


def _asserted(_: Any, message: str = "Expected Tensor with single nonzero value, but got zero") -> str:
    return f"RuntimeError: {message}"


_IGNORED = {torch.ops.prim.device.default}
"""Ops that compute nothing."""
_ASSERTING = {torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default}
"""Ops that raise an error by a value."""
_FILLING = {"fill.Scalar", "fill.Tensor", "zero.default"}
_OF_MEMORY = {"as_strided_scatter.default", "prims::as_strided_scatter.default", "as_strided_copy.default"}
"""Which take the memory of a tensor, whatever elements of it the tensor shows."""
_DETACH, _CONJ, _NEG_VIEW = (
    torch.ops.aten.detach.default,
    torch.ops.aten._conj.default,
    torch.ops.aten._neg_view.default,
)
