"""Abstract evaluation: run a torch callable once, without computing, to learn what it returns and does."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import torch
from torch._guards import active_fake_mode
from torch._subclasses import fake_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from . import dtypes, kernels
from .call import Aval
from .errors import CapturedWriteError, RandomnessError, TorchCallError, quote, signature_text
from .operations import operations
from .trees import flatten_registering, leaf_names
from .trial import fake_mode

_DATA_DEPENDENT = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
_NO_FAKE_KERNEL = (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException)
_STATIC_OUTPUTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Trace:
    """What one signature of a callable does."""

    treedef: Any
    leaves: tuple[Any, ...]
    """Output leaves: an `Aval` for each tensor, the value itself for static ones."""
    mutated: frozenset[int]
    """Operands the callable writes into, or may write into depending on values."""
    fused_kernels: frozenset[str]
    """The fused kernels it uses that have replacements (`kernels.py`)."""
    operations: float
    """How many floating-point operations it takes, about (`operations.py`)."""
    fakeable: bool = True
    """Whether it runs on fake tensors."""

    @property
    def out_avals(self) -> tuple[Aval, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Aval))


def trace(
    function: Callable[..., Any],
    operand_specs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    *,
    name: str,
    operand_names: Sequence[str],
    out_shape: Any,
    example: Callable[[], list[torch.Tensor] | None],
) -> Trace:
    """Trace `function` over flat operands of the given shapes and torch dtypes.

    In this order: on fake tensors; by the caller's `out_shape`; by one real run on `example()`.
    """
    try:
        with fake_mode():
            found = _observe(function, [torch.empty(s, dtype=d) for s, d in operand_specs], name, operand_names)
    except TorchCallError:
        raise
    except Exception as exc:
        reason = _why_not_fakeable(exc)
        if reason is None:
            raise TorchCallError(
                f"{name} failed on operands {signature_text(operand_names, operand_specs)}.\ntorch said: {quote(exc)}"
            ) from exc
        return _trace_values(function, operand_specs, name, operand_names, out_shape, example, reason, exc)
    if out_shape is not None:
        _compare(declared(out_shape), (found.treedef, found.leaves), name)
    return found


def _trace_values(
    function: Callable[..., Any],
    operand_specs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    name: str,
    operand_names: Sequence[str],
    out_shape: Any,
    example: Callable[[], list[torch.Tensor] | None],
    reason: str,
    cause: Exception,
) -> Trace:
    """Shapes of a callable that fake tensors cannot go through."""
    if out_shape is not None:
        treedef, leaves = declared(out_shape)
        return Trace(treedef, leaves, frozenset(range(len(operand_specs))), kernels.ALL, math.inf, fakeable=False)
    operands = example()
    if operands is None and not _depends_on_values(cause):
        operands = [torch.zeros(s, dtype=d) for s, d in operand_specs]  # shapes alone decide what it does
    if operands is None:
        raise TorchCallError(
            f"{name} {reason}, so the shapes of its outputs cannot be inferred without values.\n"
            "Pass `out_shape=` (a pytree of jax.ShapeDtypeStruct like the output), or `example_args=` "
            "(arguments to run it on once), or call it once outside jit, grad and vmap."
        ) from cause
    try:
        with torch.no_grad(), kernels.differentiable_path(), kernels.plain_kernels(frozenset({kernels.COMPILED})):
            found = _observe(function, operands, name, operand_names)
    except TorchCallError:
        raise
    except Exception as exc:
        raise TorchCallError(
            f"{name} {reason}, and running it on example values failed.\ntorch said: {quote(exc)}\n"
            "Pass `out_shape=` (a pytree of jax.ShapeDtypeStruct like the output)."
        ) from exc
    return replace(found, mutated=frozenset(range(len(operand_specs))), fakeable=False)


def _depends_on_values(exc: Exception) -> bool:
    # torch declares the shape of ctc_loss's intermediate dynamic; its outputs' shapes are not.
    return isinstance(exc, _DATA_DEPENDENT) and "_ctc_loss" not in str(exc.func)


def _why_not_fakeable(exc: Exception) -> str | None:
    """Why fake tensors cannot go through the callable; None if it would fail on real ones as well."""
    if isinstance(exc, fake_tensor.DataDependentOutputException):
        return f"reads values of its operands ({exc.func}, as `.item()`, `bool(...)` and `.tolist()` do)"
    if isinstance(exc, fake_tensor.DynamicOutputShapeException):
        return f"makes a tensor whose shape depends on values ({exc.func})"
    if isinstance(exc, _NO_FAKE_KERNEL):
        return f"uses an op without a shape rule ({exc})"
    if isinstance(exc, RuntimeError) and ".numpy() is not supported for tensor subclasses" in str(exc):
        return "leaves torch with `.numpy()`"
    return None


def _observe(
    function: Callable[..., Any], operands: list[torch.Tensor], name: str, operand_names: Sequence[str]
) -> Trace:
    """Run once, watching for writes into operands, random ops and tensors that stay behind. Empties `operands`."""
    storages = [StorageWeakRef(x.untyped_storage()) for x in operands]
    observer = _Observer(name, storages)
    with observer:
        treedef, leaves = _describe(function(*operands), name)
    operands.clear()
    if not all(s.expired() for s in storages):
        gc.collect()  # reference cycles are not escapes
    escaped = [n for n, s in zip(operand_names, storages, strict=True) if not s.expired()]
    if escaped:
        raise TorchCallError(
            f"{name} keeps argument {', '.join(escaped)} (or a view of it) after it returns: a closure, a global, a "
            "hook or an attribute still holds the tensor, whose memory belongs to XLA and is reused at once. Return "
            "the tensor as an output, or store `tensor.clone()`."
        )
    return Trace(treedef, leaves, frozenset(observer.mutated), frozenset(observer.fused_kernels), observer.operations)


def _describe(output: Any, name: str) -> tuple[Any, tuple[Any, ...]]:
    """The output's pytree, with an aval in the place of each tensor."""
    leaves, treedef = flatten_registering(output)
    described: list[Any] = []
    for leaf, path in zip(leaves, leaf_names(output), strict=True):
        if isinstance(leaf, torch.Tensor):
            if leaf.layout != torch.strided or leaf.is_quantized:
                raise TorchCallError(
                    f"{name} returns a tensor of layout {leaf.layout} at output{path}; JAX has dense arrays only. "
                    "Return `.to_dense()`."
                )
            described.append(Aval(tuple(leaf.shape), dtypes.canonical(leaf.dtype)))
        elif isinstance(leaf, _STATIC_OUTPUTS):
            described.append(leaf)
        else:
            raise TorchCallError(
                f"{name} returns a {type(leaf).__module__}.{type(leaf).__qualname__} at output{path}: neither a "
                "tensor, nor a pytree of tensors, nor a static value (None, bool, number, str, dtype). Return its "
                "tensors, or register its class with jax.tree_util.register_pytree_node, or switch it off with an "
                "argument (in transformers, use_cache=False)."
            )
    return treedef, tuple(described)


def declared(out_shape: Any) -> tuple[Any, tuple[Any, ...]]:
    """The caller's `out_shape` as tree and leaves."""
    leaves, treedef = flatten_registering(out_shape)
    for leaf in leaves:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"out_shape has a {type(leaf).__name__} leaf ({leaf!r}); give a pytree of jax.ShapeDtypeStruct."
            )
    return treedef, tuple(Aval(tuple(x.shape), jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves)


def _compare(expected: tuple[Any, Any], found: tuple[Any, Any], name: str) -> None:
    if expected != found:
        raise TorchCallError(
            f"{name}: out_shape says {_render(*expected)}, but the torch callable returns {_render(*found)}. "
            "Correct out_shape, or leave it out: these shapes can be inferred."
        )


def _render(treedef: Any, leaves: Sequence[Any]) -> str:
    def short(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Aval) else repr(leaf)

    return str(jax.tree.unflatten(treedef, [short(leaf) for leaf in leaves]))


class _Observer(TorchDispatchMode):
    """Sees every op with its schema: which operands it writes into, whether it is random."""

    def __init__(self, name: str, storages: Sequence[StorageWeakRef]):
        super().__init__()
        self.name = name
        self.mutated: set[int] = set()
        self.fused_kernels: set[str] = set()
        self.operations = 0.0
        self._fake = active_fake_mode() is not None  # then what the callable makes is fake, and only that
        self._operand_of = {s.cdata: i for i, s in enumerate(storages)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        declared = func._schema.arguments
        arguments = {a.name: a.default_value for a in declared if a.has_default_value()}
        arguments |= dict(zip((a.name for a in declared), args, strict=False)) | kwargs
        self.fused_kernels |= kernels.fused_kernels(func.name(), arguments)
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(arguments):
            raise RandomnessError(
                f"{self.name} draws random numbers ({func}), which JAX could neither seed nor reproduce. Random ops "
                "are not supported yet: switch dropout off (eqx.nn.inference_mode(model), or module.eval() before "
                "wrapping), or draw the numbers with jax.random and pass them in."
            )
        for argument in declared:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._note_write(arguments.get(argument.name))
        output = func(*args, **kwargs)
        self.operations += operations(func, args, kwargs, output)
        return output

    def _note_write(self, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else [written]:
            if isinstance(tensor, torch.Tensor):
                operand = self._operand_of.get(tensor.untyped_storage()._cdata)
                if operand is not None:
                    self.mutated.add(operand)
                elif self._fake and not isinstance(tensor, fake_tensor.FakeTensor):
                    raise CapturedWriteError(
                        f"{self.name} writes into a tensor of shape {tuple(tensor.shape)} that is not an argument but "
                        "captured from outside, which a pure function must not. Pass it as an argument and return the "
                        "new value.",
                        tensor,
                    )


def _draws(arguments: dict[str, Any]) -> bool:
    """Whether an op tagged random draws anything with these arguments: dropout of zero or in eval does not."""
    off = [arguments.get(n) == 0 for n in ("p", "dropout", "dropout_p") if n in arguments]
    off += [arguments.get(n) is False for n in ("train", "training") if n in arguments]
    return not any(off)
