"""Pickles of models: functions of JAX, Equinox's lambdas and sentinels by the names they are found by."""

import io
import pickle
import sys
from typing import Any

from ...interop.values.names import found_by_name


def dumps(thing: Any) -> bytes:
    """`pickle.dumps`, with what modules hold under another name than its own, or within a wrapper of that name."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(thing)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` was given."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            return NotImplemented
        if not callable(obj):
            is_compared_by_value = type(obj).__module__ == "builtins" or type(obj).__eq__ is not object.__eq__
            return NotImplemented if is_compared_by_value else _by_place(obj, type(obj).__module__)
        module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
        if not (isinstance(module, str) and isinstance(qualname, str)):
            return NotImplemented
        found, depth = found_by_name(module, qualname), 0
        while found is not None and found is not obj:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        if found is None:
            return _by_place(obj, module)
        return (_unwrapped, (module, qualname, depth)) if depth else qualname


def _by_place(obj: Any, module: str) -> Any:
    """The name that a module has for something."""
    home = vars(sys.modules[module]) if module in sys.modules else {}
    name = next((name for name, value in home.items() if value is obj), None)
    return NotImplemented if name is None else (_unwrapped, (module, name, 0))


def _unwrapped(module: str, qualname: str, depth: int) -> Any:
    __import__(module)
    found = found_by_name(module, qualname)
    for _ in range(depth):
        found = found.__wrapped__
    return found
