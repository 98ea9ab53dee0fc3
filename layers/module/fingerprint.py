"""What makes two torch modules the same function of their weights: structure, hyperparameters, attributes and code.

A fingerprint is a tuple that is equal for modules built alike. It is on the safe side: what cannot be compared by
value is compared by identity, as is what functions hold that is no part of the module, because it may change.
"""

import functools
import hashlib
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

from ...interop.internals.modules import WrappedHook
from ...interop.values.statics import static_key
from .class_cache import once_per_class
from .copying import is_plain
from .places import StandIn
from .references import ATOMS, is_filled
from .scripted import ScriptSlots

Token = Hashable


def fingerprint(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], stand_ins: Mapping[torch.Tensor, StandIn]
) -> Token:
    """The fingerprint of a module whose tensors are its `weights`, by name, and `stand_ins`."""
    return _Reader(module, weights, stand_ins).token(module)


class Same:
    """Something that equals itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Reader:
    """Makes tokens, and a number for each object, which stands for it when it is met again."""

    def __init__(
        self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor], stand_ins: Mapping[torch.Tensor, StandIn]
    ):
        self._parts = {id(part) for part in module.modules()}
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # so that no address is used again
        self._weights = {id(tensor): name for name, tensor in weights.items()}
        self._stand_ins = {id(meta): stand_in for meta, stand_in in stand_ins.items()}

    def token(self, value: Any) -> Token:
        """What stands for a value."""
        cls = type(value)
        if isinstance(value, type):
            return self._class(value)
        if cls in ATOMS:
            return static_key(value)
        if id(value) in self._weights:
            return "weight", self._weights[id(value)]
        if id(value) in self._numbers:
            return "again", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        self._held.append(value)
        read = _reader_of(cls)
        if read is None:
            return Same(value)
        shown = torch.fx.GraphModule if isinstance(value, torch.fx.GraphModule) else cls  # each has one of its own
        return read.__name__, self._class(shown), *read(self, value)

    def _class(self, cls: type) -> Token:
        """A class by name, or, if it was made in passing (a parametrised module's), by what it is made of."""
        if _is_importable(cls):
            return cls
        if id(cls) in self._numbers:
            return "again", self._numbers[id(cls)]
        self._numbers[id(cls)] = len(self._numbers)
        self._held.append(cls)
        namespace = {name: x for name, x in vars(cls).items() if name not in _OF_EVERY_CLASS}
        return "class", cls.__qualname__, tuple(map(self._class, cls.__bases__)), self._namespace(namespace)

    def _namespace(self, values: Mapping[str, Any]) -> Token:
        return tuple((name, self.token(values[name])) for name in sorted(values))

    def _items(self, values: Iterable[Any]) -> Iterator[Token]:
        yield from map(self.token, values)

    # --- by kind: what follows the class ---------------------------------------------------------------

    def module(self, value: torch.nn.Module) -> Iterator[Token]:
        if isinstance(value, torch.fx.GraphModule):
            yield tuple((n.op, n.name, self.token(n.target), str(n.args), str(n.kwargs)) for n in value.graph.nodes)
        if isinstance(value, torch.jit.ScriptModule):
            yield from self._scripted(value)
        for name, held in sorted(vars(value).items()):
            if name in _HOOKS:
                yield name, self._hooks(value, name, held)
            elif name in ("_parameters", "_buffers", "_modules"):
                yield name, tuple((key, self.token(x)) for key, x in held.items())
            elif name not in _OF_CODE and not isinstance(value, torch.jit.ScriptModule):
                yield name, self.token(held)

    def _hooks(self, module: torch.nn.Module, name: str, held: Mapping[int, Any]) -> Token:
        """In their order: they are numbered through the whole process."""
        owner = vars(module).get(name.partition("_hooks_")[0] + "_hooks") or {}
        order = {key: i for i, key in enumerate(owner)}
        return tuple((order.get(key, i), self.token(hook)) for i, (key, hook) in enumerate(held.items()))

    def _scripted(self, value: Any) -> Iterator[Token]:
        yield value._c.qualified_name
        if value._c._has_method("forward"):
            code, constants = value._c._get_method("forward").code_with_constants
            yield code, self._namespace(constants)
        yield self._namespace(ScriptSlots(value).unregistered())

    def tensor(self, value: torch.Tensor) -> Iterator[Token]:
        stand_in = self._stand_ins.get(id(value))
        if stand_in is not None:
            kept = None if stand_in.value is None else self.token(stand_in.value)
            yield stand_in.name, stand_in.why, stand_in.alias, kept
            return
        yield value.dtype, tuple(value.shape), value.requires_grad, str(value.layout), str(value.device)
        is_readable = value.layout == torch.strided and value.device.type != "meta" and not value.is_quantized
        yield _digest(value) if is_readable else Same(value)

    def array(self, value: np.ndarray) -> Iterator[Token]:
        yield str(value.dtype), value.shape
        yield Same(value) if value.dtype.hasobject else hashlib.blake2b(value.tobytes()).digest()

    def mapping(self, value: dict[Any, Any]) -> Iterator[Token]:
        if isinstance(value, defaultdict):
            yield self.token(value.default_factory)
        yield from ((self.token(k), self.token(x)) for k, x in value.items())

    def sequence(self, value: Iterable[Any]) -> Iterator[Token]:
        yield from self._items(value)

    def members(self, value: set[Any] | frozenset[Any]) -> Iterator[Token]:
        is_simple = all(type(x) in ATOMS for x in value)
        yield frozenset(map(self.token, value)) if is_simple else Same(value)

    def method(self, value: types.MethodType) -> Iterator[Token]:
        yield from self._items((value.__func__, value.__self__))

    def partial(self, value: functools.partial[Any]) -> Iterator[Token]:
        yield from self._items((value.func, value.args, value.keywords))

    def function(self, value: types.FunctionType) -> Iterator[Token]:
        if not value.__closure__ and _is_importable(value):
            yield Same(value)
            return
        yield value.__code__, Same(value.__globals__), value.__qualname__
        yield tuple(self._outside(c.cell_contents) if is_filled(c) else None for c in value.__closure__ or ())
        yield from map(self._outside, (value.__defaults__ or (), *(value.__kwdefaults__ or {}).values()))
        yield tuple((name, self._outside(x)) for name, x in sorted(vars(value).items()))

    def _outside(self, value: Any) -> Token:
        """What a function holds: parts of the module, and what cannot change, by value."""
        if isinstance(value, tuple):
            return tuple(map(self._outside, value))
        known = id(value) in self._parts or id(value) in self._numbers or id(value) in self._weights
        fixed = type(value) in ATOMS or isinstance(value, types.FunctionType | types.MethodType | type)
        return self.token(value) if known or fixed or isinstance(value, torch.Tensor) else Same(value)

    def property_(self, value: property) -> Iterator[Token]:
        yield from self._items((value.fget, value.fset, value.fdel))

    def wrapped_hook(self, value: Any) -> Iterator[Token]:
        yield from self._items((value.hook, value.with_module))

    def reference(self, value: weakref.ReferenceType[Any]) -> Iterator[Token]:
        referent = value()
        yield self.token(referent) if id(referent) in self._parts or id(referent) in self._weights else Same(referent)

    def object(self, value: Any) -> Iterator[Token]:
        yield self._namespace(vars(value))


_OF_EVERY_CLASS = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl", "__firstlineno__"})
_HOOKS = frozenset(name for name in vars(torch.nn.Module()) if "_hooks" in name)
_OF_CODE = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_compiled_call_impl"})
"""Attributes of modules that hold their code, which is read otherwise."""

_EXACT: dict[type, Callable[[_Reader, Any], Iterator[Token]]] = {
    **dict.fromkeys((dict, OrderedDict, defaultdict), _Reader.mapping),
    **dict.fromkeys((list, tuple, deque), _Reader.sequence),
    **dict.fromkeys((set, frozenset), _Reader.members),
    functools.partial: _Reader.partial,
    property: _Reader.property_,
}
_KINDS: dict[type, Callable[[_Reader, Any], Iterator[Token]]] = {
    torch.nn.Module: _Reader.module,
    WrappedHook: _Reader.wrapped_hook,
    torch.Tensor: _Reader.tensor,
    np.ndarray: _Reader.array,
    types.MethodType: _Reader.method,
    types.FunctionType: _Reader.function,
    weakref.ReferenceType: _Reader.reference,
}


@once_per_class
def _reader_of(cls: type) -> Callable[[_Reader, Any], Iterator[Token]] | None:
    if cls in _EXACT:
        return _EXACT[cls]
    if issubclass(cls, Enum):
        return None
    found = next((read for kind, read in _KINDS.items() if issubclass(cls, kind)), None)
    if found is not None:
        return found
    if issubclass(cls, tuple) and hasattr(cls, "_make"):
        return _Reader.sequence
    return _Reader.object if is_plain(cls) else None


def _is_importable(value: Any) -> bool:
    """Whether a class or function is the one of its name in its module."""
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _digest(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
    return hashlib.blake2b(values.view(torch.uint8).numpy().tobytes()).digest()
