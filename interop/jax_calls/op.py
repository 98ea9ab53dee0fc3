"""The op that stands for a JAX call wherever torch looks at ops: fake tensors, traces, the compiler, recordings."""

import itertools
import secrets
from collections.abc import Sequence

import torch

from ..internals.fake import has_dispatch_modes
from ..internals.transforms import batch_of_grads, grads_batch_level, grads_of_batch, is_grads_batch
from ..values import dtypes
from .call import JaxCall
from .kernel import run

_library = torch.library.Library("torchleaf", "FRAGMENT")
_library.define("jax_call(int number, Tensor[] operands) -> Tensor[]")

_calls: dict[int, JaxCall] = {}
"""The calls that a trace has met, which programs of torch's refer to by number; they stay, as those programs may."""
_numbers: dict[JaxCall, int] = {}
_next = itertools.count(secrets.randbits(48) << 14)  # a graph that torch caches on disk never meets another's number

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def run_or_trace(call: JaxCall, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of a call without derivatives: computed, or written down by whoever looks at ops."""
    if any(map(is_grads_batch, tensors)):
        return _for_each(call, tensors)
    if not has_dispatch_modes() and all(type(x) in _PLAIN for x in tensors):
        return run(call, tensors)
    number = _numbers.setdefault(call, next(_next))
    _calls[number] = call
    return tuple(torch.ops.torchleaf.jax_call(number, list(tensors)))


def _for_each(call: JaxCall, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The call for each of the gradients of `torch.autograd.grad(is_grads_batched=True)`."""
    levels = [grads_batch_level(x) if is_grads_batch(x) else 0 for x in tensors]
    level = max(levels)
    is_batch = [x == level for x in levels]
    plain = [grads_of_batch(x, level) if batch else x for x, batch in zip(tensors, is_batch, strict=True)]
    size = next(x.shape[0] for x, batch in zip(plain, is_batch, strict=True) if batch)
    outs = run_or_trace(call.vmap(tuple(0 if batch else None for batch in is_batch), size), plain)
    return tuple(batch_of_grads(y, level) for y in outs)


def _run(number: int, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(run(_calls[number], operands))


def _fake(number: int, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    device = next((x.device for x in operands), torch.device("cpu"))
    return [torch.empty(a.shape, dtype=dtypes.to_torch_dtype(a.dtype), device=device) for a in _calls[number].out_avals]


_library.impl("jax_call", _run, "CompositeExplicitAutograd")
torch.library.register_fake("torchleaf::jax_call", _fake, lib=_library)
