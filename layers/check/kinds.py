"""What users give: a torch module or function, or what a framework made of one."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.core import Tracer

from ...interop.function import TorchFunction, torch_function
from ...interop.types import CallOptions
from ..aliases import FRAMEWORKS
from ..equinox import TorchModule
from ..module.skeleton import is_training
from ..module.weights import to_torch_module
from .wrapped import EquinoxWrapped, FunctionWrapped, Wrapped


@dataclass(frozen=True)
class Kind:
    """How to make what a user gave again.

    **Attributes:**

    - `framework`: the framework that checks call it by, or "function".
    - `module`: torch's module; of a function, one that calls it.
    - `training`: whether it is in training mode.
    - `wrap`: as `Subject.wrap`.
    - `forward_mode`: the user's option.
    - `channels_last`: whether arrays have their channels in the last axis.
    """

    framework: str
    module: torch.nn.Module
    training: bool
    wrap: Callable[..., Wrapped]
    forward_mode: bool = True
    channels_last: bool = False


class Called(torch.nn.Module):
    """A torch function as a module, which has nothing but what the function has."""

    def __init__(self, function: Callable[..., Any], name: str):
        super().__init__()
        self.name = name
        self._function = (function,)  # in a tuple, so that it is no submodule

    def forward(self, *args: Any) -> Any:
        return self._function[0](*args)


def kind_of(given: Any, state: Any) -> Kind:
    """The kind of what the user gave; `TypeError` if it is none."""
    if isinstance(given, TorchModule):
        return _of_equinox(given, state)
    for name in FRAMEWORKS:
        if f"{_LAYERS}.{name}" in sys.modules and name != "equinox":
            framework = importlib.import_module(f".{name}", __package__)
            if isinstance(given, framework.TorchModule):
                return framework.kind_of(given)
    if isinstance(given, torch.nn.Module):
        return Kind("Equinox", given, is_training(given), _wrap_in_equinox(CallOptions()))
    if isinstance(given, TorchFunction):
        return _of_function(given)
    if callable(given) and not isinstance(given, type):
        return _of_function(torch_function(given))
    raise TypeError(
        f"check: module_or_fn must be a torch.nn.Module, a torch function, a torchleaf TorchModule or what "
        f"torchleaf.torch_function returned, got {_described(given)}. Of a model that holds a TorchModule, pass that, "
        "e.g. `model.encoder`."
    )


_LAYERS = __name__.rpartition(".check.")[0]


def widened_options(options: CallOptions, *, double: bool) -> CallOptions:
    """Options of a module or function, for one in double precision if it is to be."""
    if not double:
        return options
    return replace(
        options, out_shape=widened_array(options.out_shape), example_args=widened_array(options.example_args)
    )


def of_modules(options: CallOptions) -> dict[str, Any]:
    """Those that modules take."""
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name != "example_args"}


def widened_array(tree: Any) -> Any:
    """Arrays, and shapes of arrays, in double precision."""

    def widen(x: Any) -> Any:
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            return x
        wide = jnp.dtype("complex128" if jnp.issubdtype(dtype, jnp.complexfloating) else "float64")
        return jax.ShapeDtypeStruct(x.shape, wide) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(wide)

    return jax.tree.map(widen, tree)


def _of_equinox(model: TorchModule, state: Any) -> Kind:
    if isinstance(model.inference, Tracer):
        raise TypeError("check: the model is traced; call check outside of JAX's transformations.")
    options = model.module.options
    module, training = to_torch_module(model, state), not model.inference
    return Kind("Equinox", module, training, _wrap_in_equinox(options), options.forward_mode)


def _wrap_in_equinox(options: CallOptions) -> Callable[..., Wrapped]:
    def wrap(module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        wide = of_modules(widened_options(options, double=double))
        return EquinoxWrapped(module, wide, stateful=stateful)

    return wrap


def _of_function(function: TorchFunction) -> Kind:
    def wrap(module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        return FunctionWrapped(TorchFunction(function.target, widened_options(function.options, double=double)))

    called = Called(function.target.callable, function.name)
    return Kind("function", called, False, wrap, function.options.forward_mode)


def _described(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
