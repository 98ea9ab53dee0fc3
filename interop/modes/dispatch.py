"""The dispatch mode that torchleaf's own are: it sees the ops of a torch call, those within higher-order ops too.

A higher-order op (`torch.cond`, `flex_attention`, `scan`) takes functions. Some of them torch compiles when they are
called, and what it once met in a mode it never compiles again, in the whole process. So modes let it compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..internals.fake import FakeTensor, TorchDispatchMode
from ..internals.ops import OpOverload, lazy_bits, torch_pytree
from .aten import tensors_in
from .zeros import with_memory


class Mode(TorchDispatchMode):
    """Within it, `op` stands for each op."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an aten op, or a custom one, returns."""
        return func(*args, **kwargs)

    def higher_order_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a higher-order op returns; the mode sees the ops of the functions that it is given."""

        def watched(value: Any) -> Any:
            if not callable(value) or isinstance(value, torch.Tensor | type):
                return value
            return functools.update_wrapper(functools.partial(self._within, value), value, updated=())

        args, kwargs = torch_pytree.tree_map(watched, (args, kwargs))
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload):
            return self.higher_order_op(func, args, kwargs or {})
        kwargs = kwargs or {}
        tensors = list(tensors_in(*args, *kwargs.values()))
        if any(x.is_complex() for x in tensors) and not any(isinstance(x, FakeTensor) for x in tensors):
            with lazy_bits():
                return self.op(with_memory(func), args, kwargs)
        return self.op(with_memory(func), args, kwargs)

    def _within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return function(*args, **kwargs)
