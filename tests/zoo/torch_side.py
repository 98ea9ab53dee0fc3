"""What torch itself computes with a specimen: values, gradients, directional derivatives of gradients, training."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from .specimen import Specimen, map_tensors


class Torch:
    """A specimen's module and its arguments in one dtype."""

    def __init__(self, specimen: Specimen, *, double: bool = False):
        self._specimen, self._double = specimen, double
        self.module = specimen.module(double=double)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def arguments(self, number: int) -> tuple[Any, ...]:
        """The arguments of one call, floats as leaves to differentiate by."""
        return self.differentiable(self._specimen.arguments(number, double=self._double))

    @staticmethod
    def differentiable(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copies of arguments, floats as leaves to differentiate by."""
        return map_tensors(lambda x: x.detach().clone().requires_grad_(is_inexact(x)), args)

    def outputs(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors that are compared; the module may write into its arguments."""
        given = map_tensors(lambda x: x.clone() if is_inexact(x) else x, args)
        return tensors_of(self._specimen.output(self.module(*given)))

    def gradients(self, args: tuple[Any, ...], *, create_graph: bool = False) -> list[torch.Tensor]:
        """Those of `weighted_sum`, by the parameters and then by the float arguments."""
        wanted = [*self.parameters.values(), *filter(is_inexact, tensors_of(args))]
        loss = weighted_sum(self.outputs(args))
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in wanted]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, create_graph=create_graph)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]

    def double_backward(self, args: tuple[Any, ...], direction: list[np.ndarray]) -> list[np.ndarray]:
        """A Hessian-vector product by torch itself."""
        wanted = [*self.parameters.values(), *filter(is_inexact, tensors_of(args))]
        grads = self.gradients(args, create_graph=True)
        pairs = [(g, torch.from_numpy(d)) for g, d in zip(grads, direction, strict=True) if g.requires_grad]
        slope = sum(((g.conj() * d).sum().real for g, d in pairs), torch.zeros(()))
        products = torch.autograd.grad(slope, wanted, allow_unused=True) if pairs else [None] * len(wanted)
        return [to_numpy(torch.zeros_like(x) if p is None else p) for x, p in zip(wanted, products, strict=True)]

    def differences(self, args: tuple[Any, ...], direction: list[np.ndarray], step: float) -> list[np.ndarray]:
        """Central differences of the gradients along a direction."""
        there, back = (self._gradients_at(args, direction, sign * step) for sign in (1, -1))
        return [(a - b) / (2 * step) for a, b in zip(there, back, strict=True)]

    def _gradients_at(self, args: tuple[Any, ...], direction: list[np.ndarray], step: float) -> list[np.ndarray]:
        args = self.differentiable(args)
        moved = [*self.parameters.values(), *filter(is_inexact, tensors_of(args))]
        before = [x.detach().clone() for x in moved]
        with torch.no_grad():
            for x, d in zip(moved, direction, strict=True):
                x += step * torch.from_numpy(d).reshape(x.shape)
        try:
            return [to_numpy(g) for g in self.gradients(args)]
        finally:
            with torch.no_grad():
                for x, value in zip(moved, before, strict=True):
                    x.copy_(value)

    def train(self, rate: float, steps: int) -> list[float]:
        """The losses of steps of gradient descent."""
        optimizer, losses = torch.optim.SGD(self.parameters.values(), rate), []
        for number in range(steps):
            loss = mean_square(self.outputs(self.arguments(number)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def weights_of(size: int) -> np.ndarray:
    """Weights that differ from each other and favour no direction."""
    return np.cos(1 + math.sqrt(2) * np.arange(size))


def weighted_sum(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A real scalar in which each element of the inexact outputs has a weight of its own."""
    terms = [
        (torch.from_numpy(weights_of(y.numel())).to(y.dtype) * y.reshape(-1)).sum() for y in outputs if is_inexact(y)
    ]
    return sum((t.real for t in terms), torch.zeros(()))


def mean_square(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A loss to train by."""
    return sum(((y.abs() ** 2).mean() for y in outputs if is_inexact(y)), torch.zeros(()))


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in tuples, lists and dicts, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def is_inexact(x: torch.Tensor) -> bool:
    """Whether a tensor is real or complex."""
    return x.is_floating_point() or x.is_complex()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """A copy."""
    return x.detach().resolve_conj().resolve_neg().cpu().numpy().copy()


def changes_state(specimen: Specimen, *, training: bool | None = None) -> bool:
    """Whether a call changes buffers."""
    module = specimen.module(training=training)
    before = state_of(module)
    module(*specimen.arguments(0))
    after = state_of(module)  # and caches that the call registered
    return any(not np.array_equal(value, after[name], equal_nan=True) for name, value in before.items())


def state_of(module: nn.Module) -> dict[str, np.ndarray]:
    """The buffers by name."""
    return {name: to_numpy(b) for name, b in module.named_buffers()}
