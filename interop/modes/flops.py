"""How much arithmetic an aten op does, about: enough to tell a call that is over in microseconds from a long one.

Source: [torch.utils.flop_counter](https://docs.pytorch.org/docs/stable/_modules/torch/utils/flop_counter.html).
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ..internals.ops import torch_pytree


def flops_of(op: Any, args: Any, kwargs: Any, output: Any) -> float:
    """Floating-point operations of matrix products, convolutions and attention; otherwise the largest tensor's size."""
    formula = flop_registry.get(op.overloadpacket)
    if formula is not None:
        return float(formula(*args, **kwargs, out_val=output))
    tensors = [x for x in torch_pytree.tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
    if op is torch.ops.aten.mkldnn_rnn_layer.default:
        rows, weights = args[0].shape[:-1], args[1:3]
        return 2.0 * math.prod(rows) * sum(w.numel() for w in weights)
    return float(max((x.numel() for x in tensors), default=0))
