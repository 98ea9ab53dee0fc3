"""What torch keeps to itself of its ops, their kernels, and autograd."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils import _pytree as torch_pytree

__all__ = ["BackwardHookFunction", "SingleLevelFunction", "torch_pytree"]

_C: Any = torch._C

OpOverload = torch._ops.OpOverload
"""What a dispatch mode sees of an op; all else is a higher-order op."""

DisableTorchFunction: Any = _C.DisableTorchFunction
"""Within it no function mode sees what is asked of a tensor; else modes of ours see themselves."""


def requires_grad(tensor: torch.Tensor) -> bool:
    """Whether a tensor requires a gradient; no function mode sees that it is asked for."""
    if not _C._len_torch_function_stack():
        return tensor.requires_grad
    with DisableTorchFunction():
        return tensor.requires_grad


def decomposition_of(op: Any) -> Callable[..., Any] | None:
    """torch's own composition of an op of others, in Python; ops without one are carried by torch."""
    return importlib.import_module("torch._decomp").decomposition_table.get(op)


FUNCTION_BASE: type = _C._FunctionBase
"""What nodes of a graph are that are written in Python: their edges have to be held by a tensor."""


def plain_apply(function: Any, *args: Any) -> Any:
    """`apply` of a `torch.autograd.Function` outside of torch.func."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*args)


WEIGHT_NORM, BATCH_NORM = torch._weight_norm, torch._native_batch_norm_legit  # pyright: ignore[reportPrivateImportUsage]
"""What function modes see of weight norm and of batch norm; their second derivatives are composed."""

SET_GRAD_ENABLED: Any = _C._set_grad_enabled
"""What function modes see of `torch.no_grad` and the like; forward mode follows it."""


def _keys(*keys: Any) -> Any:
    return functools.reduce(_C.DispatchKeySet.__or__, map(_C.DispatchKeySet, keys))


_KEYS = _C.DispatchKey
_LAZY = _keys(_KEYS.Conjugate, _KEYS.Negative)
_ABOVE_OPS = _keys(_KEYS.AutogradFunctionality, _KEYS.ADInplaceOrView, _KEYS.AutocastCPU, _KEYS.AutocastCUDA)


def lazy_bits() -> Any:
    """Within it, conjugates and negatives that are views are resolved, as outside of modes.

    In a mode, kernels that call other ops take them for what they are views of: `torch.linalg.pinv`, of complex
    matrices, is another matrix there.
    """
    included, excluded = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
    return _C._ForceDispatchKeyGuard(included, excluded - _LAZY)


def ops_only() -> Any:
    """Within it, ops go straight to their kernels, past autograd and autocast: a third of what a small op costs."""
    return _C._ExcludeDispatchKeyGuard(_ABOVE_OPS)


@functools.cache
def lacks_autograd(op: Any) -> bool:
    """Whether an op has kernels, and none for autograd, so that torch takes what it returns for a constant."""
    keys, name = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd"), op.name()
    has_any = _C._dispatch_has_kernel(name)
    return has_any and not any(_C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def in_torchscript() -> bool:
    """Whether TorchScript is running; some fused kernels lack derivatives there."""
    profiler = _C._profiler
    return any(profiler.symbolize_tracebacks([profiler.gather_traceback(False, True, False)]))


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors, or None: `torch.utils.checkpoint` is recognised by its own."""
    return _C._autograd._top_saved_tensors_default_hooks(True)


def composites_in_python() -> Any:
    """Within it, ops that are made of others are so in Python, if they can be: those in C++ want to know sizes."""
    return importlib.import_module("torch._dispatch.python").enable_python_dispatcher()
