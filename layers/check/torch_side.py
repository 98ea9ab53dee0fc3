"""What torch itself computes with a subject: values, gradients, directional derivatives of either."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...interop.calls.reverse import refuse_dead_ends
from ...interop.values.dtypes import is_inexact_tensor
from ...interop.values.names import leaf_names
from .numbers import to_numpy, weights_of
from .subject import Subject, map_tensors, tensors_of

Direction = Sequence[np.ndarray]
"""An array for each parameter and then for each float argument."""


class Torch:
    """A subject's module and its arguments in one precision."""

    def __init__(self, subject: Subject, *, double: bool = False, drawing: bool = False):
        self._subject, self._double = subject, double
        self.module = subject.reference(double=double, drawing=drawing)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def arguments(self, number: int) -> tuple[Any, ...]:
        """The arguments of one call, floats as leaves to differentiate by."""
        return self.differentiable(self._subject.arguments(number, double=self._double))

    @staticmethod
    def differentiable(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copies of arguments, floats as leaves to differentiate by."""
        return map_tensors(lambda x: x.detach().clone().requires_grad_(is_inexact_tensor(x)), args)

    def wanted(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """What gradients are taken by: the parameters and then the float arguments."""
        return [*self.parameters.values(), *filter(is_inexact_tensor, tensors_of(args))]

    def names(self, args: tuple[Any, ...]) -> list[str]:
        """The same, as texts call them."""
        tree = map_tensors(lambda x: x if is_inexact_tensor(x) else None, args)
        leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        given = [f"argument {path}" for path, x in leaves if isinstance(x, torch.Tensor)]
        return [*(f"parameter `{name}`" for name in self.parameters), *given]

    def outputs(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The tensors that are compared; the module may write into its arguments."""
        given = map_tensors(torch.clone, args)
        return tensors_of(self._subject.output(self.module(*given)))

    def loss(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The weighted sum of the outputs."""
        return [weighted_sum(self.outputs(args))]

    def inexact_outputs(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The outputs, with zeros for those that have no derivatives."""
        return [y if is_inexact_tensor(y) else torch.zeros(y.shape) for y in self.outputs(args)]

    def gradients(self, args: tuple[Any, ...], *, create_graph: bool = False) -> list[torch.Tensor]:
        """Those of `weighted_sum`, by what is `wanted`."""
        wanted, loss = self.wanted(args), weighted_sum(self.outputs(args))
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in wanted]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, create_graph=create_graph)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]

    def is_differentiable(self, args: tuple[Any, ...]) -> bool:
        """Whether there is something to differentiate, and by something."""
        return weighted_sum(self.outputs(args)).requires_grad

    def double_backward(self, args: tuple[Any, ...], direction: Direction) -> list[np.ndarray]:
        """A Hessian-vector product by torch itself."""
        with sdpa_kernel(SDPBackend.MATH):  # the kernel of attention that has one
            wanted, grads = self.wanted(args), self.gradients(args, create_graph=True)
            refuse_dead_ends(grads)
            pairs = [(g, torch.from_numpy(d).to(g)) for g, d in zip(grads, direction, strict=True) if g.requires_grad]
            slope = sum(((g.conj() * d).sum().real for g, d in pairs), torch.zeros(()))
            products = torch.autograd.grad(slope, wanted, allow_unused=True) if pairs else [None] * len(wanted)
        return [to_numpy(torch.zeros_like(x) if p is None else p) for x, p in zip(wanted, products, strict=True)]

    def forward_mode(self, args: tuple[Any, ...], direction: Direction) -> None:
        """Whatever forward mode torch has, its own or reverse mode twice; raises if it has neither."""
        try:
            self._dual(args, direction)
        except RuntimeError:  # a NotImplementedError is one
            self.double_backward(args, direction)

    def _dual(self, args: tuple[Any, ...], direction: Direction) -> None:
        tangents = iter([torch.from_numpy(d).to(x) for x, d in zip(self.wanted(args), direction, strict=True)])
        with forward_ad.dual_level():
            params = {name: forward_ad.make_dual(p.detach(), next(tangents)) for name, p in self.parameters.items()}
            duals = map_tensors(
                lambda x: forward_ad.make_dual(x.detach(), next(tangents)) if is_inexact_tensor(x) else x.clone(), args
            )
            torch.func.functional_call(self.module, params, duals)

    def differences(
        self, function: Callable[[Any], list[torch.Tensor]], args: tuple[Any, ...], direction: Direction, step: float
    ) -> list[np.ndarray]:
        """Central differences of a function, such as `gradients`, along a direction."""
        there, back = (self._moved(function, args, direction, sign * step) for sign in (1, -1))
        return [np.asarray((a - b) / (2 * step)) for a, b in zip(there, back, strict=True)]

    def _moved(
        self, function: Callable[[Any], list[torch.Tensor]], args: tuple[Any, ...], direction: Direction, step: float
    ) -> list[np.ndarray]:
        args = self.differentiable(args)
        moved = self.wanted(args)
        before = [x.detach().clone() for x in moved]
        with torch.no_grad():
            for x, d in zip(moved, direction, strict=True):
                x += step * torch.from_numpy(d).to(x).reshape(x.shape)
        try:
            return [to_numpy(y) for y in function(args)]
        finally:
            with torch.no_grad():
                for x, value in zip(moved, before, strict=True):
                    x.copy_(value)


def weighted_sum(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A real scalar in which each element of the inexact outputs has a weight of its own."""
    terms = [
        (torch.from_numpy(weights_of(y.numel())).to(y) * y.reshape(-1)).sum() for y in outputs if is_inexact_tensor(y)
    ]
    return sum((t.real for t in terms), torch.zeros(()))


def changes_state(subject: Subject, *, drawing: bool = False) -> bool:
    """Whether a call changes buffers."""
    module = subject.reference(drawing=drawing)
    before = state_of(module)
    module(*subject.arguments(0))
    after = state_of(module)  # and caches that the call registered
    return any(not np.array_equal(value, after[name], equal_nan=True) for name, value in before.items())


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The buffers by name."""
    return {name: to_numpy(b) for name, b in module.named_buffers()}
