"""`jax_function`: a JAX function as a torch function over pytrees."""

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from .internals.compiler import opaque_to_compiler, run_by_compiler
from .jax_calls.arguments import Arguments
from .jax_calls.specialized import Specialized
from .values.names import found_by_name


def jax_function(fn: Any = None) -> Any:
    """Make a JAX function callable from torch: differentiated, batched and compiled by torch like one of its own.

    ```python
    @torchleaf.jax_function
    def pendulum(state, *, damping):
        angle, speed = state
        return speed, -jnp.sin(angle) - damping * speed

    angle = torch.tensor([0.5], requires_grad=True)
    speed, acceleration = pendulum((angle, torch.zeros(1)), damping=0.1)
    acceleration.sum().backward()
    ```

    The function is compiled by `jax.jit` once for each signature, and must be pure as JAX means it. On the CPU,
    tensors that are contiguous are viewed, not copied, and so are its outputs.

    A function with an argument `key` that is called without one draws it from torch's default generator, so that
    `torch.manual_seed` and `torch.utils.checkpoint` hold for it; `key` may also be a `torch.Generator` or a JAX key.

    **Arguments:**

    - `fn`: any callable over `jax.Array`s that can be traced. Its positional and keyword arguments may be any pytrees;
      `torch.Tensor` leaves become arrays of the same shape and dtype, JAX's and NumPy's arrays are operands too, and
      every other leaf (bool, number, string, function) is static. Without `jax_enable_x64`, JAX sees int64 as int32.

    **Returns:** a function that takes tensors where `fn` takes arrays and returns what `fn` returns, with a
    `torch.Tensor` for each array or number. Without x64, JAX's default integer, int32, is returned as torch's, int64.

    **Raises:** when called: `TypeError` or `ValueError` for a tensor that JAX has no array for (float64 without x64,
    meta, sparse, on another device), for a static argument that cannot be hashed, and an output that is no array;
    `JaxCallError` for what JAX raises.

    Source: [torch.func](https://docs.pytorch.org/docs/stable/notes/extending.func.html).
    """
    if fn is None:
        return jax_function
    if not callable(fn):
        raise TypeError(f"jax_function: fn is {fn!r}, which cannot be called. Give a function over JAX arrays.")
    return JaxFunction(fn)


class JaxFunction:
    """What `jax_function` returns. Like a function it is no object to look into: it has no attributes to set."""

    __slots__ = ("__weakref__", "_fn", "_key_place", "_name", "_opaque", "_specialized", "_specializing")

    def __init__(self, fn: Callable[..., Any]):
        self._fn, self._name, self._key_place = fn, _name_of(fn), _place_of_key(fn)
        self._opaque: Any = None
        self._specialized: dict[Any, Specialized] = {}
        self._specializing = threading.RLock()

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The JAX function."""
        return self._fn

    @property
    def __name__(self) -> str:
        return self._name.rpartition(".")[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            self._prepare_for_compiler()
            return self._opaque(args, kwargs)
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        may_draw, generator = self._draws_key(args, kwargs), None
        if may_draw:
            generator = kwargs.get("key")
            kwargs = {name: value for name, value in kwargs.items() if name != "key"}
        arguments = Arguments(self._name, self._fn, args, kwargs)
        return self._at(arguments, may_draw)(arguments.operands, generator)

    def _draws_key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the function takes a key and is given none, or a generator to draw it from."""
        if self._key_place is None or len(args) > self._key_place:
            return False
        return "key" not in kwargs or isinstance(kwargs["key"], torch.Generator)

    @run_by_compiler
    def _prepare_for_compiler(self) -> None:
        """`torch.compile` is about to meet this function, whose Python it must not look into: JAX's."""
        if self._opaque is None:
            self._opaque = opaque_to_compiler(lambda args, kwargs: self._call(args, kwargs))

    def __set_name__(self, owner: type, name: str) -> None:
        """In the body of a class it is a method, as functions are."""
        self.__class__ = JaxMethod  # pyright: ignore[reportAttributeAccessIssue]

    def __repr__(self) -> str:
        return f"jax_function({self._name})"

    def __reduce__(self) -> Any:
        """By its name where it is found by it, as functions are: what is behind a decorator cannot be."""
        module = getattr(self._fn, "__module__", None)
        is_found = found_by_name(module, self._name) is self
        return (_imported, (module, self._name)) if is_found else (JaxFunction, (self._fn,))

    def __deepcopy__(self, memo: dict[int, Any]) -> "JaxFunction":
        return self  # as functions are

    def _at(self, arguments: Arguments, may_draw: bool) -> Specialized:
        key = arguments.key, may_draw
        found = self._specialized.get(key)
        if found is None:
            with self._specializing:
                found = self._specialized.get(key)
                if found is None:
                    found = self._specialized[key] = Specialized(self._name, self._fn, arguments, may_draw)
        return found


class JaxMethod(JaxFunction):
    """A `JaxFunction` in the body of a class: bound to the instance as functions are.

    A class of its own, since torch 2.11's compiler takes whatever has `__get__` for a descriptor, also an attribute of
    an instance.
    """

    __slots__ = ()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


def _imported(module: str, qualname: str) -> Any:
    importlib.import_module(module)
    return found_by_name(module, qualname)


def _place_of_key(fn: Callable[..., Any]) -> int | None:
    """How many arguments stand before `key`, if the function takes one by this name."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return None
    if "key" not in parameters:
        return None
    is_keyword = parameters["key"].kind is inspect.Parameter.KEYWORD_ONLY
    return sys.maxsize if is_keyword else [*parameters].index("key")


def _name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__
