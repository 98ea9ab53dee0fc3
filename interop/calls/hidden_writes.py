"""What a trace of the forward call cannot see of differentiation, found by a fake backward pass.

Hooks (`x.register_hook(lambda g: g.clamp_(-1, 1))`) and custom functions write into cotangents and into what they
saved; some code writes where `x.requires_grad`. The memory is JAX's, whose arrays never change.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ForeignTensorError, RandomnessError, TorchCallError
from ..internals.fake import FakeTensor
from ..modes.aten import bound, tensors_in, written
from ..modes.dispatch import Mode
from ..modes.fake_run import fake_run
from ..modes.random import draws
from ..types import Tensors
from ..values.dtypes import is_inexact
from ..values.memory import has_storage, storage_of
from ..wording import says_leaf_written
from . import reverse, scope
from .base import Base
from .call import take


def hidden_writes(call: Base) -> bool:
    """Whether torch's backward pass of a call may write into its operands or into cotangents.

    Notes, too, what else the call should know of it. Raises `TorchCallError` for a forward pass that writes into
    operands only where gradients are recorded, `RandomnessError` for a backward pass that draws random numbers.
    """
    if call.facts.checkpoints == "reentrant":
        raise TorchCallError(
            f"{call.name} uses torch.utils.checkpoint with use_reentrant=True, whose backward pass leaves out the "
            "gradients of weights unless torch's `.backward()` runs it. Pass `use_reentrant=False` (in transformers, "
            '`gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})`).'
        )
    if not call.facts.fakeable and call.facts.reads is None:
        call.reenters |= bool(call.facts.foreign)
        return True
    watch, failure = _fake_backward_pass(call)
    if watch.foreign is not None and not call.reenters:
        call.reenters = True
        watch, failure = _fake_backward_pass(call)
    call.has_sparse_gradients = watch.makes_sparse
    if watch.foreign is not None:
        raise ForeignTensorError(call.name, *watch.foreign)
    if watch.in_forward or says_leaf_written(str(failure)):
        raise TorchCallError(
            f"{call.name} writes into an argument only where that requires gradients, so that it and its gradient "
            "would be of two functions. Write in all cases, or into a clone."
        )
    if watch.random is not None and failure is None:
        raise RandomnessError(
            f"{call.name} draws random numbers in its backward pass ({watch.random}), which no key drives. Draw them "
            "in the forward pass and save them."
        )
    return failure is not None or watch.writes


def _fake_backward_pass(call: Base) -> "tuple[_Watch, Exception | None]":
    """What its ops did, and how it failed."""
    active = tuple(i for i, aval in enumerate(call.in_avals) if is_inexact(aval.dtype) and i not in call.buffers)
    cotangents = take(call.out_avals, call.inexact_outs)
    n, watch = len(call.in_avals), _Watch(call.facts.foreign)

    def differentiate(*tensors: torch.Tensor) -> None:
        operands = list(tensors[:n])

        def function(*xs: torch.Tensor) -> Tensors:
            for i, x in zip(active, xs, strict=True):
                operands[i] = x
            outs = call.run(*operands)
            watch.in_forward, watch.writes, watch.random = watch.writes, False, None  # what follows is backward
            return take(outs, call.inexact_outs)

        with watch.over(tensors), scope.opened() if call.reenters else contextlib.nullcontext():
            reverse.pullback(function, take(tensors, active), tensors[n:])

    return watch, fake_run(differentiate, (*call.in_avals, *cotangents), call.facts.device, call.facts.reads or ())


class _Watch(Mode):
    """Notes writes into tensors or views of them, random ops, and foreign tensors (`trace.py`)."""

    def __init__(self, foreign: Mapping[int, str]):
        super().__init__()
        self.writes = self.in_forward = self.makes_sparse = False
        self.random: Any = None
        self.foreign: tuple[torch.Tensor, str] | None = None
        self._foreign_storages, self._storages = foreign, set[int]()

    def over(self, tensors: Sequence[torch.Tensor]) -> "_Watch":
        """Watch these tensors."""
        self._storages = {storage_of(x) for x in tensors}
        return self

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        arguments = bound(func, args, kwargs)
        self.writes |= any(storage_of(x) in self._storages for x in filter(has_storage, written(func, arguments)))
        if draws(func, arguments):
            self.random = func
        for x in tensors_in(*arguments.values()) if self._foreign_storages else ():
            if not isinstance(x, FakeTensor) and has_storage(x) and storage_of(x) in self._foreign_storages:
                self.foreign = x, self._foreign_storages[storage_of(x)]
        self.makes_sparse |= "_sparse_coo_tensor" in func.name()
        return func(*args, **kwargs)
