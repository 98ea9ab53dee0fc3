"""Abstract evaluation: run a torch callable once, without computing, to learn what it returns and does."""

import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import torch
from torch._guards import active_fake_mode
from torch._subclasses import fake_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import dtypes, kernels
from .aten import bound, in_checkpoint, written
from .call import Aval
from .errors import CapturedWriteError, StateError, TorchCallError, quote, signature_text
from .operations import operations
from .packed import BatchSizes
from .random import draws, refuse
from .trees import flatten_registering, leaf_names
from .trial import fake_mode
from .zeros import with_memory

_DATA_DEPENDENT = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
_NO_FAKE_KERNEL = (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException)
Flat = Callable[..., tuple[Any, Sequence[Any]]]
"""A function of flat tensors: its output, any pytree, and what its state operands are after it."""

_STATIC_OUTPUTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Trace:
    """What one signature of a callable does."""

    treedef: Any
    leaves: tuple[Any, ...]
    """Output leaves: an `Aval` for each tensor, the value itself for static ones."""
    mutated: frozenset[int]
    """Operands the callable writes into, or may write into depending on values."""
    state: tuple[int, ...]
    """Operands of which the callable has new values after it: those of `state_operands` it changes, or may change."""
    fused_kernels: frozenset[str]
    """The fused kernels it uses that have replacements (`kernels.py`)."""
    operations: float
    """How many floating-point operations it takes, about (`operations.py`)."""
    random: bool
    """Whether it draws random numbers, or may draw them depending on values."""
    captures: bool = True
    """Whether it computes with tensors of its own, or may do so."""
    checkpoints: bool = False
    """Whether it uses `torch.utils.checkpoint`."""
    fakeable: bool = True
    """Whether it runs on fake tensors."""
    grad_mode: bool = True
    """Whether it has to run in torch's default grad mode also where nothing is differentiated."""

    @property
    def out_avals(self) -> tuple[Aval, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Aval))


@dataclass(frozen=True)
class Traceable:
    """A torch callable over flat tensors, before it is known what it does."""

    function: Flat
    name: str
    operand_names: Sequence[str]
    specs: Sequence[tuple[tuple[int, ...], torch.dtype]]
    """Shapes and torch dtypes of the operands."""
    device: torch.device
    """Where they lie."""
    state_operands: tuple[int, ...]
    """Operands whose values after the call the function returns beside its output."""
    has_key: bool
    """Whether random ops have a key to draw from."""
    key_remedy: str
    """What to do where they have none."""


def trace(traced: Traceable, *, out_shape: Any, example: Callable[[], list[torch.Tensor] | None]) -> Trace:
    """Trace a callable: on fake tensors; or by the caller's `out_shape`; or by one real run on `example()`."""
    try:
        found = _observe_fake(traced, grad_mode=True)
    except TorchCallError:
        raise
    except Exception as exc:
        reason = _why_not_fakeable(exc)
        if reason is None:
            shown = signature_text(traced.operand_names, traced.specs)
            hint = _WANTS_BATCH if isinstance(exc, ValueError) and _is_of_batchnorm(exc) else ""
            raise TorchCallError(f"{traced.name} failed on operands {shown}.\ntorch said: {quote(exc)}{hint}") from exc
        return _trace_values(traced, out_shape, example, reason, exc)
    if out_shape is not None:
        _compare(declared(out_shape), (found.treedef, found.leaves), traced.name)
    if "recurrent" in found.fused_kernels:  # oneDNN's are faster where no gradients are recorded
        return replace(found, grad_mode=not _is_same_without_gradients(traced, found))
    return found


def _trace_values(
    traced: Traceable,
    out_shape: Any,
    example: Callable[[], list[torch.Tensor] | None],
    reason: str,
    cause: Exception,
) -> Trace:
    """What is known of a callable that fake tensors cannot go through: it may do whatever values make it do."""
    anything = Trace(
        *declared(() if out_shape is None else out_shape),
        mutated=frozenset(range(len(traced.specs))),
        state=traced.state_operands,
        fused_kernels=kernels.ALL,
        operations=math.inf,
        random=traced.has_key,
        fakeable=False,
    )
    if out_shape is not None:
        return anything
    operands = example()
    if operands is None and not _depends_on_values(cause):
        operands = [
            torch.zeros(s, dtype=d, device=traced.device) for s, d in traced.specs
        ]  # shapes alone decide what it does
    if operands is None:
        raise TorchCallError(
            f"{traced.name} {reason}, so the shapes of its outputs cannot be inferred without values.\n"
            "Pass `out_shape=` (a pytree of jax.ShapeDtypeStruct like the output), or `example_args=` "
            "(arguments to run it on once), or call it once outside jit, grad and vmap."
        ) from cause
    try:
        eager = kernels.plain_kernels(frozenset({kernels.COMPILED}))
        with torch.inference_mode(False), torch.no_grad(), kernels.differentiable_path(), eager:
            found = _observe(traced, operands)
    except TorchCallError:
        raise
    except Exception as exc:
        raise TorchCallError(
            f"{traced.name} {reason}, and running it on example values failed.\ntorch said: {quote(exc)}\n"
            "Pass `out_shape=` (a pytree of jax.ShapeDtypeStruct like the output)."
        ) from exc
    known = {"treedef": found.treedef, "leaves": found.leaves, "checkpoints": found.checkpoints}
    return replace(anything, **known, operations=found.operations)


def _depends_on_values(exc: Exception) -> bool:
    """Whether values, not shapes alone, may decide what a callable returns that raised this on fake tensors."""
    if not isinstance(exc, _DATA_DEPENDENT):
        return False
    # torch declares the shape of ctc_loss's intermediate dynamic; its outputs' shapes are not. Lengths of packed
    # sequences are static as a rule; those that are operands are refused as zeros.
    if any(op in str(exc.func) for op in ("_ctc_loss", "_pack_padded_sequence")):
        return False
    return not _is_of_batchnorm(exc)  # with momentum=None it reads its number of batches as a factor


def _is_of_batchnorm(exc: Exception) -> bool:
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(exc.__traceback__)]
    return torch.nn.modules.batchnorm.__file__ in files


_WANTS_BATCH = (
    ". BatchNorm takes the whole batch: call the module outside jax.vmap, and vmap only the JAX parts of the model."
)


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
    if isinstance(exc, RuntimeError) and "its data is not allocated yet" in str(exc):
        return "reads or writes memory past torch's dispatcher, as some C++ kernels do (`pad_packed_sequence`)"
    return None


def _observe_fake(traced: Traceable, *, grad_mode: bool) -> Trace:
    with fake_mode():
        return _observe(
            traced, [torch.empty(s, dtype=d, device=traced.device) for s, d in traced.specs], grad_mode=grad_mode
        )


def _is_same_without_gradients(traced: Traceable, found: Trace) -> bool:
    """Whether the callable does the same in torch's no_grad mode, as far as a trace tells."""
    try:
        other = _observe_fake(traced, grad_mode=False)
    except Exception:  # it takes gradients itself
        return False
    return replace(other, operations=found.operations) == found


def _observe(traced: Traceable, operands: list[torch.Tensor], *, grad_mode: bool = True) -> Trace:
    """Run once, watching for writes into operands, random ops and tensors that stay behind. Empties `operands`."""
    name = traced.name
    storages = [StorageWeakRef(x.untyped_storage()) for x in operands]
    observer = _Observer(name, storages, None if traced.has_key else traced.key_remedy)
    with observer, torch.set_grad_enabled(grad_mode):
        output, after = traced.function(*operands)
        treedef, leaves = _describe(output, name)
        state = {i: x for i, x in zip(traced.state_operands, after, strict=True) if x is not operands[i]}
        _check_state(traced, state)
    observer.mutated |= {  # by `tensor.data = ...`
        i for i, (x, s) in enumerate(zip(operands, storages, strict=True)) if x.untyped_storage()._cdata != s.cdata
    }
    changed = tuple(i for i in traced.state_operands if i in state or i in observer.mutated)
    del output, after, state
    operands.clear()
    if not all(s.expired() for s in storages):
        gc.collect()  # reference cycles are not escapes
    escaped = [n for n, s in zip(traced.operand_names, storages, strict=True) if not s.expired()]
    if escaped:
        raise TorchCallError(
            f"{name} keeps argument {', '.join(escaped)} (or a view of it) after it returns: a closure, a global, a "
            "hook or an attribute still holds the tensor, whose memory belongs to XLA and is reused at once. Return "
            "the tensor as an output, or store `tensor.clone()`."
        )
    return Trace(
        treedef,
        leaves,
        mutated=frozenset(observer.mutated),
        state=changed,
        fused_kernels=frozenset(observer.fused_kernels),
        operations=observer.operations,
        random=observer.random,
        captures=observer.captures,
        checkpoints=observer.checkpoints,
    )


_NO_CAPTURES = (fake_tensor.FakeTensor, BatchSizes)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _check_state(traced: Traceable, state: dict[int, Any]) -> None:
    """A value that takes the place of another must be like it: programs and loops are compiled for one shape."""
    for i, value in state.items():
        shape, dtype = traced.specs[i]
        if not isinstance(value, torch.Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
            given = signature_text(["it"], [(value.shape, value.dtype)]) if isinstance(value, torch.Tensor) else value
            raise StateError(
                f"{traced.name} replaces `{traced.operand_names[i]}` ({dtype}{list(shape)}) by {given}: state must "
                "keep its shape and dtype. Allocate a buffer of the final size, and write into it."
            )


def _describe(output: Any, name: str) -> tuple[Any, tuple[Any, ...]]:
    """The output's pytree, with an aval in the place of each tensor."""
    leaves, treedef = flatten_registering(output, every_record=True)
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
                "tensors, or register its class with jax.tree_util.register_pytree_node."
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

    def __init__(self, name: str, storages: Sequence[StorageWeakRef], key_remedy: str | None):
        super().__init__()
        self.name = name
        self.mutated: set[int] = set()
        self.fused_kernels: set[str] = set()
        self.operations = 0.0
        self.random = self.checkpoints = self.captures = False
        self._key_remedy = key_remedy  # None: there is a key
        self._fake = active_fake_mode() is not None  # then what the callable makes is fake, and only that
        self._operand_of = {s.cdata: i for i, s in enumerate(storages)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = with_memory(func), kwargs or {}
        arguments = bound(func, args, kwargs)
        self.fused_kernels |= kernels.fused_kernels(func.name(), arguments)
        if draws(func, arguments):
            if self._key_remedy is not None:
                raise refuse(self.name, func, self._key_remedy)
            self.random = True
        self.checkpoints |= in_checkpoint()
        self.captures |= not all(isinstance(x, _NO_CAPTURES) for x in tree_leaves((args, kwargs)) if _is_tensor(x))
        for tensor in written(func, arguments):
            self._note_write(tensor)
        output = func(*args, **kwargs)
        self.operations += operations(func, args, kwargs, output)
        return output

    def _note_write(self, tensor: torch.Tensor) -> None:
        operand = self._operand_of.get(tensor.untyped_storage()._cdata)
        if operand is not None:
            self.mutated.add(operand)
        elif self._fake and not isinstance(tensor, fake_tensor.FakeTensor | BatchSizes):
            raise CapturedWriteError(
                f"{self.name} writes into a tensor of shape {tuple(tensor.shape)} that is not an argument but "
                "captured from outside, which a pure function must not. Pass it as an argument and return the "
                "new value.",
                tensor,
            )
