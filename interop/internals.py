"""The only door to what torch and JAX keep to themselves: their modules and names with an underscore.

Each name says what it stands for and what breaks without it, so that a new release is tried here first. All of these
are there in torch 2.11 to 2.15 and JAX 0.10 to 0.12.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import torch
from jax._src import core as _jax_core
from jax._src import dispatch as _jax_dispatch
from jax._src import sharding_impls as _jax_shardings
from jax._src import util as _jax_util
from jax._src.interpreters import ad as _jax_ad
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib import xla_client as _xla_client  # pyright: ignore[reportPrivateImportUsage]
from torch._functorch import pyfunctorch as _pyfunctorch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.jit._recursive import wrap_cpp_module
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils import _pytree as torch_pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "BackwardHookFunction",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "UnsupportedFakeTensorException",
    "torch_pytree",
    "without_modes",
    "wrap_cpp_module",
]

_C: Any = torch._C
_functorch: Any = _C._functorch
_KEYS = _C.DispatchKey


# --- JAX -------------------------------------------------------------------------------------------


def let_caches_hold_weakly(kinds: Iterable[type]) -> None:
    """JAX's caches of abstract evaluation hold parameters of these types weakly; else dropped functions stay."""
    getattr(_jax_util, "weakref_cache_key_types", set()).update(kinds)


def ask_for_devices(primitive: Any) -> None:
    """Have JAX say, when it lowers a program with this primitive, which devices it is for."""
    _jax_dispatch.prim_requires_devices_during_lowering.add(primitive)


def devices_of(axis_context: Any) -> tuple[Any, ...]:
    """The devices that XLA is to partition a program for; none in one for a device each (`shard_map`, `pmap`)."""
    if isinstance(axis_context, _jax_shardings.ShardingContext):
        return axis_context.device_assignment or ()
    return ()


def another_cpu() -> Any:
    """A device on the CPU with a client of XLA's, and so with threads, of its own."""
    return _xla_client.make_cpu_client().local_devices()[0]


def axes_left_to_xla(axis_context: Any) -> tuple[str, ...]:
    """Within a `shard_map` over some axes of a mesh: the others, over which XLA partitions its body."""
    if not isinstance(axis_context, _jax_shardings.SPMDAxisContext):
        return ()
    sizes = axis_context.mesh.shape
    return tuple(axis for axis in sizes if axis not in axis_context.manual_axes and sizes[axis] > 1)


def is_tracing() -> bool:
    """Whether JAX traces in this thread: what is called then becomes part of the trace, constants included."""
    return not _jax_core.trace_ctx.is_top_level()


def view_as_array(tensor: torch.Tensor, device: Any) -> jax.Array:
    """A dense tensor on the CPU as an array: `jax.dlpack.from_dlpack`, at a tenth of its time."""
    return _jax.dlpack_managed_tensor_to_buffer(_C._to_dlpack(tensor), device, None)


def view_as_tensor(array: jax.Array) -> torch.Tensor:
    """An array on the CPU as a tensor: `torch.from_dlpack`, at a fifth of its time."""
    return _C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(array))


# --- sizes that are not known ---------------------------------------------------------------------


def new_size(env: Any, name: str, example: int, lowest: int, highest: int | None) -> tuple[str, torch.SymInt]:
    """A size of torch's that is not known, with an example of it and bounds; and the name of its symbol."""
    source = importlib.import_module("torch._dynamo.source").ConstantSource(name)
    dynamic = importlib.import_module("torch.fx.experimental.symbolic_shapes").DimDynamic.DYNAMIC
    ranges = importlib.import_module("torch.utils._sympy.value_ranges").ValueRanges
    infinity = importlib.import_module("torch.utils._sympy.numbers").int_oo
    symbol = env.create_symbol(example, source, dynamic_dim=dynamic, do_not_specialize_zero_one=True)
    env.var_to_range[symbol] = ranges(lowest, infinity if highest is None else highest)
    return symbol.name, env.create_symintnode(symbol, hint=example)


def composites_in_python() -> Any:
    """Within it, ops that are made of others are so in Python, if they can be: those in C++ want to know sizes."""
    return importlib.import_module("torch._dispatch.python").enable_python_dispatcher()


# --- ops and modes ---------------------------------------------------------------------------------

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


def set_linearization(primitive: Any, rule: Callable[..., Any]) -> None:
    """Give a primitive a rule for linearization, which JAX tells whether reverse mode asks.

    `rule(is_reverse, nonzeros, *primals, **params)` gives the outputs, whether each has a tangent, residuals, and a
    function of those and of tangents; or None, where JAX is to go by the rule for forward mode. Without it, it always
    would.
    """
    has_structured_residuals = jax.__version_info__ >= (0, 11)

    def linearize(is_reverse: bool, nonzeros: Any, *primals: Any, **params: Any) -> Any:
        found = rule(is_reverse, nonzeros, *primals, **params)
        if found is None:
            return _jax_ad.fallback_linearize_rule(primitive, is_reverse, nonzeros, *primals, **params)
        if not has_structured_residuals:
            return found
        *others, linear = found
        return *others, None, lambda residuals, _, *tangents: linear(residuals, *tangents)

    _jax_ad.primitive_linearizations[primitive] = linearize


def _keys(*keys: Any) -> Any:
    return functools.reduce(_C.DispatchKeySet.__or__, map(_C.DispatchKeySet, keys))


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


# --- the compiler ----------------------------------------------------------------------------------


def load_compiler() -> None:
    """What `torch.compile` loads when it is first needed."""
    importlib.import_module("torch._dynamo")


def compiler_is_loaded() -> bool:
    """Whether it is there; to load it takes a second."""
    return "torch._dynamo" in sys.modules


def opaque_to_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` takes as one step, its insides seen by autograd and traces only."""
    return importlib.import_module("torch._dynamo").nonstrict_trace(fn)


def run_by_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that `torch.compile` runs when it meets it, and whose result, None, it takes for a constant."""
    vars(fn)["_dynamo_marked_constant"] = True
    return fn


FAKE_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
"""Where fake tensors say what they cannot do."""


# --- modules ---------------------------------------------------------------------------------------

WrappedHook: Any = torch.nn.modules.module._WrappedHook
"""What a module has in the place of a hook that is given the module: a copy is to hold the copy."""

DropoutNd: Any = torch.nn.modules.dropout._DropoutNd
"""What all dropout layers are."""


def script_attributes(module: Any) -> dict[str, Any]:
    """The declared attributes of a scripted module, which has them in C++."""
    return _C.ConcreteModuleType.from_jit_type(module._c._type()).get_attributes()


# --- switches --------------------------------------------------------------------------------------

ONEDNN: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._get_mkldnn_enabled, _C._set_mkldnn_enabled)
CUDNN: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._get_cudnn_enabled, _C._set_cudnn_enabled)
"""Whether a library is used, and what sets it: `torch.backends` refuses to where torch's test tools are imported."""

VMAP_FALLBACK: tuple[Callable[[], bool], Callable[[bool], None]] = (
    _functorch._is_vmap_fallback_enabled,
    _functorch._set_vmap_fallback_enabled,
)
"""Whether `torch.func.vmap` loops over ops without a rule, with a warning each; fake runs want an error."""

FORWARD_GRAD: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._is_fwd_grad_enabled, _C._set_fwd_grad_enabled)
"""Whether this thread's ops carry tangents; `torch.no_grad` alone does not stop them."""


# --- torch.func ------------------------------------------------------------------------------------


def transforms() -> list[Any]:
    """The transforms of torch.func that are running, the outermost first; empty on plain values."""
    return _pyfunctorch.retrieve_all_functorch_interpreters()


JVP_TRANSFORM, VMAP_TRANSFORM = _pyfunctorch.JvpInterpreter, _pyfunctorch.VmapInterpreter
"""Their classes."""


def without_transforms() -> Any:
    """Within it none is running, so that values can be looked at."""
    return _pyfunctorch.temporarily_clear_interpreter_stack()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch in a `torch.func.vmap`."""
    return _functorch.is_batchedtensor(tensor)


def batch_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The level of the vmap that a batch belongs to, and its axis."""
    return _functorch.maybe_get_level(tensor), _functorch.maybe_get_bdim(tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func has wrapped a tensor."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """What is in the wrapper."""
    return _functorch.get_unwrapped(tensor)


def innermost_transform() -> Any:
    """The kind of the innermost transform that is running, or None; quicker than `transforms`."""
    interpreter = _functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


TRANSFORM = _functorch.TransformType
"""The kinds: Grad, Jvp, Vmap, Functionalize."""


def has_dispatch_modes() -> bool:
    """Whether ops are looked at by a mode: a trace, fake tensors, a recording."""
    return _C._len_torch_dispatch_stack() > 0


def has_tangents(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor is a dual number of `torch.autograd.forward_ad`."""
    level = torch.autograd.forward_ad._current_level
    return level >= 0 and not is_grads_batch(tensor) and torch._VF._unpack_dual(tensor, level=level)[1] is not None


def is_grads_batch(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a batch of `torch.autograd.grad(is_grads_batched=True)`, which is no vmap of torch.func."""
    return _functorch.is_legacy_batchedtensor(tensor)


def grads_batch_level(batch: torch.Tensor) -> int:
    """The innermost level of such a batch, also in autograd's own threads, which know nothing of levels."""
    return next(level for level in range(_MOST_LEVELS, 0, -1) if _has_level(batch, level))


_MOST_LEVELS = 64


def _has_level(batch: torch.Tensor, level: int) -> bool:
    """Without it torch expands what it is given, to size 0 here."""
    return _C._VariableFunctions._remove_batch_dim(batch, level, 0, 0).shape[0] != 0


def grads_of_batch(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """What is in such a batch, its batch axis in front; a size that is not the batch's is never looked at."""
    return _C._VariableFunctions._remove_batch_dim(tensor, level, 1, 0)


def batch_of_grads(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """A tensor as such a batch over its first axis."""
    return _C._VariableFunctions._add_batch_dim(tensor, 0, level)


# --- memory ----------------------------------------------------------------------------------------


def _address_by_storage(tensor: torch.Tensor) -> int:
    with DisableTorchFunction():
        return tensor.untyped_storage()._cdata


storage_address: Callable[[torch.Tensor], int] = getattr(_C, "_storage_address", _address_by_storage)
"""Where a tensor's storage is; no mode sees that it is asked for."""


def storage_holders(tensor: torch.Tensor) -> int:
    """How many hold a tensor's storage: a tensor of XLA's memory that stays behind is found by it."""
    return _C._storage_Use_Count(tensor.untyped_storage()._cdata)


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors into others, in as few kernels as may be."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def throw_on_writes(tensor: torch.Tensor) -> None:
    """Make it an error to write into a tensor's memory, or to ask for it, when there is none any more."""
    _C._set_throw_on_mutable_data_ptr(tensor)
