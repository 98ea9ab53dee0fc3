"""Recurrent layers on a GPU: their weights in one piece of memory, as cuDNN wants them, for each call anew.

torch's layers move their weights into one piece for good (`flatten_parameters`). Those of a call are JAX's arrays, each
where it is; so they are joined by an op that torch differentiates, records and captures like any other.

Source: [RNNBase.flatten_parameters](https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html).
"""

import functools
import types
from typing import Any

import torch
from torch import nn

from ...interop.internals.fake import without_modes


def join_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Let the recurrent layers in a module, which is a copy, join the weights of each call."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            vars(part)["flatten_parameters"] = types.MethodType(_join, part)
    return module


def _join(layer: nn.RNNBase) -> None:
    """Put views of one tensor in the place of the weights, if they are for cuDNN."""
    weights: list[Any] = layer._flat_weights
    first = weights[0] if len(weights) == len(layer._flat_weights_names) else None
    if not isinstance(first, torch.Tensor) or first.device.type != "cuda":
        return
    if any(not isinstance(w, torch.Tensor) or w.dtype != first.dtype for w in weights):
        return
    if not torch.backends.cudnn.is_acceptable(first):
        return
    order = _order(_shape_of(layer), tuple(w.shape for w in weights), first.dtype, first.device)
    if order is not None:
        joined = torch.cat([weights[i].reshape(-1) for i in order])
        parts = joined.split([weights[i].numel() for i in order])
        for i, part in zip(order, parts, strict=True):
            weights[i] = part.view(weights[i].shape)


def _shape_of(layer: nn.RNNBase) -> tuple[Any, ...]:
    """What torch tells cuDNN of a layer."""
    per_layer = (4 if layer.bias else 2) + (layer.proj_size > 0)
    sizes = (layer.hidden_size, layer.proj_size, layer.num_layers)
    mode = torch.backends.cudnn.rnn.get_cudnn_mode(layer.mode)
    return per_layer, layer.input_size, mode, *sizes, layer.batch_first, bool(layer.bidirectional)


@functools.cache
def _order(
    layer: tuple[Any, ...], shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, ...] | None:
    """The order in which cuDNN wants the weights of such a layer; None if it wants gaps between them."""
    with without_modes(), torch.no_grad():
        weights = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        torch.ops.aten._cudnn_rnn_flatten_weight(weights, *layer)  # moves them
    order = sorted(range(len(weights)), key=lambda i: weights[i].storage_offset())
    end = 0
    for i in order:
        if weights[i].storage_offset() != end:
            return None
        end += weights[i].numel()
    return tuple(order)
