"""Modules with one forward each, over what a forward may write to or keep things in."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Box:
    """An object that is no container, as the caches of language models."""

    content: Any = None


class _Module(nn.Module):
    scale: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear, self.child = nn.Linear(3, 3), nn.Identity()
        self.frozen = nn.Parameter(torch.rand(3) + 0.5, requires_grad=False)
        self.register_buffer("scale", torch.rand(3) + 0.5)
        self.register_buffer("temporary", None, persistent=False)
        self.embedding = nn.Embedding(5, 3, max_norm=0.5)
        self.last, self.history, self.child.cache, self.child.box = None, [], {}, Box()


def module_of(forward: Callable[..., Any]) -> nn.Module:
    """A module of that name and forward, with

    - parameters `linear.weight`, `linear.bias`, `embedding.weight` (of at most a norm) and `frozen`, a buffer `scale`;
    - a buffer `temporary` (None), which no state dict has;
    - attributes `last` (None), `history` (a list), `child.cache` (a dict) and `child.box` (an object).
    """
    return type(forward.__name__, (_Module,), {"forward": forward})()


def run(module: nn.Module, x: torch.Tensor) -> Any:
    """What torch makes of it, on copies of the module and the input."""
    return copy.deepcopy(module)(x.clone())
