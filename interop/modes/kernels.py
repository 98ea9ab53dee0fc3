"""Which kernels torch runs: those it can differentiate, in the place of those it cannot.

Fused attention has neither a forward-mode formula nor a second derivative (pytorch issues 98164, 117629,
154226), recurrent layers of oneDNN and cuDNN have no batching rule for their backward, compiled code has first-order
reverse mode only. torch's plain kernels have all.
The fast path of `nn.TransformerEncoder` and `nn.MultiheadAttention` runs only where no gradient is asked for. With a
mask it gives other values at padded positions than the path gradients take, so there it stays off: a function and its
gradient must be of one function.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import TorchCallError
from ..internals.compiler import compiler_is_loaded
from ..internals.ops import in_torchscript
from ..internals.switches import CUDNN, ONEDNN
from ..process.switches import Switch, flag_off
from . import formulas
from .forward_ad import one_at_a_time, uses_forward_mode

NONE: frozenset[str] = frozenset()
MASKED = "masked attention"
DROPPED = "attention with dropout"
"""Fused, it would draw another mask than torch's plain kernel, by which its derivatives and batches are computed."""
COMPILED = "compiled"
SCRIPTED = "scripted"
FORWARD_MODE = "forward mode"
HIGHER_ORDER = "higher-order ops"
UNRECORDED = frozenset({COMPILED, HIGHER_ORDER})
"""Those that are more than the ops that a mode sees."""
FUSED = frozenset({"attention", "recurrent", MASKED, COMPILED})
ALL = FUSED | formulas.WRONG

_MARKS = formulas.MARKS | {
    "attention": ("attention", "transformer_encoder", "attn"),
    "recurrent": ("rnn", "lstm", "gru"),
}


def fused_kernels(op_name: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Which of the replaceable kernels an aten op stands for; and what runs it, TorchScript or forward mode."""
    found = frozenset(kernel for kernel, marks in _MARKS.items() if any(mark in op_name for mark in marks))
    if in_torchscript():
        found |= {SCRIPTED, *(_scripted(kernel) for kernel in found)}
    if uses_forward_mode():
        found |= {FORWARD_MODE}
    if "attention" in found and arguments.get("dropout_p"):
        found |= {DROPPED}
    if "attention" in found and (arguments.get("attn_mask") is not None or arguments.get("is_causal")):
        found |= {MASKED}
    return found


def lacking_derivatives(order: int, *, forward: bool) -> frozenset[str]:
    """The kernels that have to be replaced for derivatives of an order, or in forward mode."""
    if order < 2 and not forward:
        return NONE
    return ALL if order > 2 else FUSED | formulas.WRONG_TWICE


def refuse_scripted(name: str, kernels: frozenset[str], lacking: frozenset[str]) -> None:
    """Raise where TorchScript runs ops by formulas that would have to be replaced, and cannot be within it."""
    wrong = sorted(kernel for kernel in lacking & formulas.WRONG if _scripted(kernel) in kernels)
    if wrong:
        raise TorchCallError(
            f"{name}: TorchScript runs a {wrong[0]}, of which torch has this derivative wrong (a higher one). Pass the "
            "function or module that was scripted instead: outside TorchScript, torchleaf composes it of other ops."
        )


def _scripted(kernel: str) -> str:
    return f"{SCRIPTED} {kernel}"


def compiled_code(function: Callable[..., Any]) -> frozenset[str]:
    """`COMPILED` if the function, or a part of the module it is a method of, came from `torch.compile`."""
    if not compiler_is_loaded():
        return NONE
    owner = getattr(function, "__self__", None)
    parts = owner.modules() if isinstance(owner, torch.nn.Module) else ()
    return frozenset({COMPILED} if any(hasattr(f, "_torchdynamo_orig_callable") for f in (function, *parts)) else ())


@contextlib.contextmanager
def compiling(kernels: frozenset[str], hook: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Around a callable that uses `kernels` and calls `hook`, which is not to be compiled with it."""
    if COMPILED not in kernels:
        yield hook
        return
    with quiet_compiler():
        yield torch.compiler.disable(hook)


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without what torch says of its compiler, which asks every tensor for `.grad`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def _without_compiler() -> contextlib.AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded() else contextlib.nullcontext()


_ONEDNN, _CUDNN = flag_off(*ONEDNN), flag_off(*CUDNN)
_FAST_PATH = flag_off(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
_SWITCHES = {
    "attention": (Switch(lambda: sdpa_kernel(SDPBackend.MATH)),),
    "recurrent": (_ONEDNN, _CUDNN),
    COMPILED: (Switch(_without_compiler),),
}


@contextlib.contextmanager
def plain_kernels(kernels: frozenset[str] = ALL) -> Iterator[None]:
    """Run torch's plain kernels instead of the fused ones named."""
    with contextlib.ExitStack() as stack:
        for kernel in sorted(kernels & _SWITCHES.keys()):
            for switch in _SWITCHES[kernel]:
                stack.enter_context(switch.held())
        if kernels & formulas.WRONG:
            stack.enter_context(formulas.Composed(kernels & formulas.WRONG))
        yield


def differentiable_path() -> contextlib.AbstractContextManager[None]:
    """Run the code torch runs when gradients are wanted."""
    return _FAST_PATH.held()


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Around runs on fake tensors: cuDNN's recurrent layers look at the memory of their weights."""
    return _CUDNN.held()


@contextlib.contextmanager
def _both(kernels: frozenset[str]) -> Iterator[None]:
    with differentiable_path(), plain_kernels(kernels):
        yield


@contextlib.contextmanager
def _in_turn(context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    with one_at_a_time(), context:
        yield


_NO_CHANGE = contextlib.nullcontext()


def chosen(
    kernels: frozenset[str], *, inference: bool, plain: frozenset[str]
) -> contextlib.AbstractContextManager[None]:
    """Around a call that uses `kernels`: in inference or for derivatives, some of them `plain`."""
    if FORWARD_MODE in kernels:  # the callable's own
        return _in_turn(chosen(kernels - {FORWARD_MODE}, inference=inference, plain=plain))
    if DROPPED in kernels:
        plain |= {"attention"}
    differentiable = "attention" in kernels and (MASKED in kernels or not inference)
    if plain:
        return _both(plain) if differentiable else plain_kernels(plain)
    return differentiable_path() if differentiable else _NO_CHANGE
