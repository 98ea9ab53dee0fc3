"""Whole copies of modules: as `copy.deepcopy` makes them, with the functions that use the module copied, too.

`copy.deepcopy` keeps functions as they are, so that closures over `self`, patched forwards, hooks and compiled methods
of a copy would compute with the original's weights. Here a function that leads to a part of the module, or to one of
the tensors that are replaced, gets cells of its own; others stay as they are, as do locks, compilers and the like.
"""

import copy
import functools
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...interop.internals.fake import without_modes
from ...interop.internals.modules import WrappedHook
from .class_cache import once_per_class
from .parametrized import copy_class, is_parametrized
from .references import ATOMS, COMPILED_FROM, is_filled, references
from .scripted import copy_scripted, holds_code

StandIn = Callable[[torch.Tensor, Callable[[], str]], torch.Tensor | None]
"""What takes the place of a tensor, given how to name the attribute that holds it; None for a copy."""


def copy_replacing(
    module: torch.nn.Module, replacements: Mapping[torch.Tensor, torch.Tensor], stand_in: StandIn | None = None
) -> torch.nn.Module:
    """A copy of `module` with other tensors in the place of its own; ties stay ties."""
    return Copier(module, replacements, stand_in).copied()


class Copier:
    """One copy in the making.

    **Arguments:**

    - `module`: what is copied.
    - `replacements`: tensors of the module, each with what takes its place.
    - `stand_in`: asked about every other tensor.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        replacements: Mapping[torch.Tensor, torch.Tensor],
        stand_in: StandIn | None = None,
    ):
        self._module, self._stand_in = module, stand_in
        self.memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
        self.memo[id(self.memo)] = []  # as in `copy.deepcopy`: keeps alive what was made meanwhile
        self._parts = list(module.modules())
        self._targets = {*self.memo, *map(id, self._parts)} - {id(self.memo)}
        self._apart: set[int] = set()
        self._at: tuple[Any, str] = (module, "")
        self.caches: list[Any] = []
        """Functions with a cache (`functools.lru_cache`) that were copied."""
        self.is_scattered = False
        """Whether weights may be in other places than `_parameters` and `_buffers`."""

    def copied(self) -> torch.nn.Module:
        """The copy of the module; `TypeError` naming the attribute that cannot be copied."""
        try:
            with without_modes():  # else its other tensors would become fake when a trace needs a copy
                for part in self._parts:
                    if isinstance(part, torch.jit.ScriptModule):
                        self.copy(part)
                blank = [part for part in self._parts if id(part) not in self.memo and is_plain(type(part))]
                self.memo |= {id(part): type(part).__new__(type(part)) for part in blank}
                for part in reversed(blank):  # inner ones first: classes with a way of their own look into them
                    self._fill(part, self.memo[id(part)])
                return self.copy(self._module)
        except Exception as exc:
            raise TypeError(
                f"{type(self._module).__name__} cannot be copied with copy.deepcopy ({self._where()}"
                f"{type(exc).__name__}: {exc}); torchleaf keeps a copy of the module without its weights. Remove the "
                "attribute that cannot be copied, or give its class a __deepcopy__."
            ) from exc

    def copy(self, value: Any) -> Any:
        """The copy of anything that the module holds; the same one each time."""
        if type(value) in ATOMS:
            return value
        if id(value) in self.memo:
            self.is_scattered |= isinstance(value, torch.Tensor)
            return self.memo[id(value)]
        copied = _copier_of(type(value))(self, value)
        self.memo[id(value)] = copied
        return copied

    def leads_to_module(self, value: Any) -> bool:
        """Whether something leads to a part of the module, or to one of its weights."""
        if id(value) in self._apart or type(value) in ATOMS:
            return False
        visited = {id(value)}
        if self._is_target(value):
            return True
        for held in references(value):
            if self._is_target(held.value):
                return True
            visited.add(id(held.value))
        self._apart |= visited
        return False

    def if_led(self, value: Any) -> Any:
        """A copy of what leads to the module; other things stay."""
        return self.copy(value) if self.leads_to_module(value) else value

    def _is_target(self, value: Any) -> bool:
        if id(value) in self._targets:
            return True
        if isinstance(value, weakref.ReferenceType):
            return id(value()) in self._targets
        return isinstance(value, torch.Tensor) and self._stood_in(value) is not None

    def _stood_in(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return None if self._stand_in is None else self._stand_in(tensor, self._name)

    def _name(self) -> str:
        """Where it is copying, as a dotted name."""
        module, attribute = self._at
        path = next((path for path, part in self._module.named_modules() if part is module), "")
        return f"{path}.{attribute}" if path else attribute

    def _where(self) -> str:
        return f"attribute `{self._name()}`: " if self._at[1] else ""

    def keep(self, value: Any) -> None:
        """Keep something alive that was made for copying, so that no other object gets its address."""
        self.memo[id(self.memo)].append(value)

    def _remember(self, value: Any, copied: Any) -> Any:
        """Note a copy before its parts are made, for those that lead back to it."""
        self.memo[id(value)] = copied
        return copied

    # --- by kind ------------------------------------------------------------------------------------

    def _fill(self, module: torch.nn.Module, blank: torch.nn.Module) -> None:
        cls, outside = type(module), self._at
        state = vars(module) if holds_code(module) or is_parametrized(cls) else module.__getstate__()
        self.keep(state)
        filled: dict[str, Any] = {}
        for name, value in state.items():
            self._at = (module, name)
            filled[name] = self._weights(value) if name in ("_parameters", "_buffers") else self.copy(value)
        if cls.__setstate__ is torch.nn.Module.__setstate__ or state is vars(module):
            vars(blank).update(filled)
        else:
            blank.__setstate__(filled)
        if is_parametrized(cls):
            blank.__class__ = copy_class(cls, self)
        self._at = outside

    def _weights(self, namespace: dict[str, Any]) -> dict[str, Any]:
        memo = self.memo
        copies = {name: memo[id(x)] if id(x) in memo else self.copy(x) for name, x in namespace.items()}
        return type(namespace)(copies)

    def _unregistered(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module that is no part: in a list or a closure."""
        if not is_plain(type(module)):
            return self._foreign(module)
        blank = self._remember(module, type(module).__new__(type(module)))
        self._fill(module, blank)
        return blank

    def _scripted(self, module: Any) -> Any:
        self.is_scattered = True
        return copy_scripted(module, self)

    def _compiled_module(self, module: Any) -> Any:
        """Compiled by the same compiler, which finds what it compiled before."""
        context = module.dynamo_ctx
        compiled = self._remember(module, context(self.copy(module._orig_mod)))
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                vars(compiled)[name] = self.copy(value)
        return compiled

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        stood_in = self._stood_in(tensor)
        if stood_in is not None:
            self.is_scattered = True
            return stood_in
        is_plain = tensor.is_leaf and tensor.layout == torch.strided
        return copy.deepcopy(tensor, self.memo) if is_plain else tensor.detach().clone()

    def _object(self, value: Any) -> Any:
        made = self._remember(value, object.__new__(type(value)))
        vars(made).update({name: self.copy(item) for name, item in vars(value).items()})
        return made

    def _mapping(self, value: dict[Any, Any]) -> dict[Any, Any]:
        made = self._remember(value, type(value)())
        made.update({self.copy(k): self.copy(x) for k, x in value.items()})
        return made

    def _defaultdict(self, value: Any) -> Any:
        made = self._remember(value, defaultdict(self.copy(value.default_factory)))
        made.update({self.copy(k): self.copy(x) for k, x in value.items()})
        return made

    def _list(self, value: list[Any]) -> list[Any]:
        made = self._remember(value, [])
        made.extend(map(self.copy, value))
        return made

    def _deque(self, value: Any) -> Any:
        made = self._remember(value, deque(maxlen=value.maxlen))
        made.extend(map(self.copy, value))
        return made

    def _set(self, value: set[Any]) -> set[Any]:
        made = self._remember(value, set())
        made.update(map(self.copy, value))
        return made

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self.copy(x) for x in value]
        if all(x is y for x, y in zip(items, value, strict=True)):
            return value
        return self.memo.get(id(value)) or getattr(type(value), "_make", type(value))(items)

    def _frozenset(self, value: frozenset[Any]) -> frozenset[Any]:
        return frozenset(map(self.copy, value))

    def _method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(self.if_led(value.__func__), self.copy(value.__self__))

    def _partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        made = functools.partial(self.if_led(value.func), *map(self.copy, value.args), **self.copy(value.keywords))
        vars(made).update({name: self.copy(item) for name, item in vars(value).items()})
        return made

    def _function(self, value: types.FunctionType) -> Any:
        if not self.leads_to_module(value):
            return value
        if COMPILED_FROM in vars(value):
            return self._compiled_function(value)
        cells = tuple(map(self._cell, value.__closure__ or ()))
        made = self._remember(
            value, types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        )
        for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
            setattr(made, name, self.if_led(getattr(value, name)))
        vars(made).update({name: self.if_led(item) for name, item in vars(value).items()})
        for cell, made_cell in zip(value.__closure__ or (), cells, strict=True):
            if made_cell is not cell and is_filled(cell) and not is_filled(made_cell):
                made_cell.cell_contents = self.copy(cell.cell_contents)
        return made

    def _cell(self, cell: Any) -> Any:
        """One of its own where the contents lead to the module; functions that shared it share the new one."""
        if id(cell) not in self.memo:
            led = is_filled(cell) and self.leads_to_module(cell.cell_contents)
            self.memo[id(cell)] = types.CellType() if led else cell
        return self.memo[id(cell)]

    def _compiled_function(self, value: Any) -> Any:
        """Compiled by the same compiler; one that cannot be found is left out, which changes no value."""
        self._remember(value, value)  # if it leads back to itself
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        original = self.copy(vars(value)[COMPILED_FROM])
        compiler = cells["self"].cell_contents if "self" in cells else None
        return compiler(original) if callable(compiler) else original

    def _cached_function(self, value: Any) -> Any:
        """A `functools.lru_cache`: the copy has a cache of its own."""
        if not self.leads_to_module(value.__wrapped__):
            return value
        made = functools.lru_cache(**value.cache_parameters())(self.copy(value.__wrapped__))
        self.caches.append(made)
        return made

    def _wrapped_hook(self, value: Any) -> Any:
        """A hook as torch keeps some of them, which `copy.deepcopy` keeps as it is."""
        made = copy.deepcopy(value, {**self.memo, id(value.hook): value.hook})
        made.hook = self.if_led(value.hook)
        return made

    def _weak_reference(self, value: Any) -> Any:
        referent = value()
        if type(value) is not weakref.ref or id(referent) not in self._targets:
            return value
        return weakref.ref(self.copy(referent))

    def _foreign(self, value: Any) -> Any:
        made = copy.deepcopy(value, self.memo)
        self.is_scattered |= made is not value
        return made

    def _kept(self, value: Any) -> Any:
        return value


_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_KINDS: dict[Any, Callable[[Copier, Any], Any]] = {
    torch.jit.ScriptModule: Copier._scripted,
    WrappedHook: Copier._wrapped_hook,
    torch.nn.Module: Copier._unregistered,
    torch.Tensor: Copier._tensor,
    types.MethodType: Copier._method,
    types.FunctionType: Copier._function,
    weakref.ReferenceType: Copier._weak_reference,
    **dict.fromkeys((type, types.ModuleType, types.BuiltinFunctionType, *_LOCKS), Copier._kept),
    **dict.fromkeys((torch.jit.ScriptFunction, torch.ScriptObject), Copier._kept),
}
_CONTAINERS: dict[type, Callable[[Copier, Any], Any]] = {
    dict: Copier._mapping,
    OrderedDict: Copier._mapping,
    defaultdict: Copier._defaultdict,
    list: Copier._list,
    deque: Copier._deque,
    set: Copier._set,
    tuple: Copier._tuple,
    frozenset: Copier._frozenset,
    functools.partial: Copier._partial,
    type(functools.lru_cache(lambda: None)): Copier._cached_function,
}


@once_per_class
def _copier_of(cls: type) -> Callable[[Copier, Any], Any]:
    if cls in _CONTAINERS:
        return _CONTAINERS[cls]
    if issubclass(cls, torch.nn.Module) and cls.__name__ == "OptimizedModule":
        return Copier._compiled_module
    for kind, copier in _KINDS.items():
        if issubclass(cls, kind):
            return copier
    if issubclass(cls, tuple) and hasattr(cls, "_make") and not hasattr(cls, "__deepcopy__"):
        return Copier._tuple
    return Copier._object if is_plain(cls) else Copier._foreign


@once_per_class
def is_plain(cls: type) -> bool:
    """Whether `copy.deepcopy` would make an empty instance of the class and fill its namespace."""
    if is_parametrized(cls):
        return is_plain(cls.__bases__[0])
    plain = not hasattr(cls, "__deepcopy__") and cls.__reduce_ex__ is object.__reduce_ex__
    plain &= cls.__reduce__ is object.__reduce__ and not hasattr(cls, "__getnewargs__")
    if issubclass(cls, torch.nn.Module):
        return plain and not hasattr(cls, "__getnewargs_ex__")
    plain &= cls.__new__ is object.__new__ and cls.__dictoffset__ != 0 and not hasattr(cls, "__setstate__")
    plain &= getattr(cls, "__getstate__", None) is getattr(object, "__getstate__", None)
    return plain and not any("__slots__" in vars(base) for base in cls.__mro__ if vars(base).get("__slots__"))
