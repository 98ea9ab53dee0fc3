"""Which torch modules can be wrapped, and what their users should know."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ...interop.values import dtypes
from .skeleton import named_tensors


def check_module(module: Any) -> None:
    """`TypeError` for what is no module, or has weights that cannot be leaves; warnings for what will be otherwise."""
    if not isinstance(module, torch.nn.Module):
        hint = " (a class: pass an instance)" if isinstance(module, type) else ""
        raise TypeError(f"TorchModule: module must be a torch.nn.Module, got {type(module).__name__}{hint}.")
    weights = named_tensors(module)
    for name, tensor in weights:
        _check_weight(f"{type(module).__name__}.{name}", name, tensor)
    _warn_of_double(type(module).__name__, weights)
    _warn_of_compilation_in_place(module)


def _check_weight(shown: str, name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise TypeError(
            f"TorchModule: {shown} is uninitialised (a lazy module). Run the torch module once on an example input "
            "before wrapping it."
        )
    if getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise TypeError(
            f"TorchModule: {shown} has a hook that torch calls when it has accumulated `.grad` "
            "(`register_post_accumulate_grad_hook`); JAX has no such attribute. Remove it; a hook of the gradient "
            "itself is `register_hook`."
        )
    if type(tensor) not in _PLAIN and type(tensor).__torch_function__ is not _PLAIN[0].__torch_function__:
        raise TypeError(
            f"TorchModule: {shown} is a {type(tensor).__name__}, a tensor with operations of its own, which the arrays "
            "of a call have not. Make it a plain one, and do what it does in `forward`: "
            f"`module.{name} = torch.nn.Parameter(module.{name}.as_subclass(torch.Tensor).detach())`."
        )
    if not tensor.is_leaf:
        raise TypeError(
            f"TorchModule: buffer {shown} has a graph: it was computed from parameters, by which gradients would have "
            "to flow, as they do through no buffer. Compute it in `forward`, or detach it: "
            f"`module.{name} = module.{name}.detach()`."
        )


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def computes_in_double(weights: Sequence[tuple[str, torch.Tensor]]) -> bool:
    """Whether all weights that are no integers are of double precision."""
    inexact = [t.dtype for _, t in weights if dtypes.is_inexact_tensor(t)]
    return bool(inexact) and all(dtype in (torch.float64, torch.complex128) for dtype in inexact)


def _warn_of_double(module_name: str, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
    """As JAX warns of dtypes that it has only with x64."""
    wide = [name for name, t in weights if _is_cut(t)]
    if wide:
        shown = ", ".join(f"`{name}`" for name in wide[:4]) + (f" and {len(wide) - 4} more" if len(wide) > 4 else "")
        warnings.warn(
            f"TorchModule: {module_name} has weights of double precision ({shown}), which JAX has only with "
            "`jax.config.update('jax_enable_x64', True)`. Their leaves are of single precision; the module computes "
            "with them in double precision. Enable it, or wrap `module.float()`.",
            stacklevel=_users_line(),
        )


def _is_cut(tensor: torch.Tensor) -> bool:
    return dtypes.is_inexact_tensor(tensor) and dtypes.canonical(tensor.dtype) != dtypes.to_jax_dtype(tensor.dtype)


def _warn_of_compilation_in_place(module: torch.nn.Module) -> None:
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules()):
        warnings.warn(
            f"TorchModule: {type(module).__name__} or a part of it was compiled in place (`module.compile()`), which "
            "torch does not carry over to a copy: it will run uncompiled. Wrap `torch.compile(module)` instead.",
            stacklevel=_users_line(),
        )


def _users_line() -> int:
    """How far up the stack the code is that wraps the module, for warnings."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _FRAMEWORKS:
        frame, level = frame.f_back, level + 1
    return level


_FRAMEWORKS = (__name__.partition(".")[0], "equinox", "flax", "jax", "jaxtyping", "beartype")
