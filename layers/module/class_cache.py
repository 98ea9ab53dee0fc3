"""What is found out about classes once, for as long as they live."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


def once_per_class(find: Callable[[type], Found]) -> Callable[[type], Found]:
    """Call `find` once for each class, which is not kept alive: a parametrised module has one of its own."""
    known: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def found(cls: type) -> Found:
        if cls not in known:
            known[cls] = find(cls)
        return known[cls]

    return found
