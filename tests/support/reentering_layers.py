"""Modules whose backward pass runs a part of them again, or reads their weights."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3).eval()
        self.scale = nn.Parameter(torch.rand(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.linear(x))) * self.scale


class Checkpointed(nn.Module):
    """Its blocks run again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = _Block(), _Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(lambda y: self.second(y) + self.first.linear.bias, x, use_reentrant=False)


class NestedCheckpoints(Checkpointed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(y):
            return checkpoint(self.first, y, use_reentrant=False) * 2

        return checkpoint(lambda y: self.second(inner(y)), x, use_reentrant=False)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


class _Recompute(torch.autograd.Function):
    """As `odeint_adjoint` does it: the parameters are passed, the module is held."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *params)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            grads = torch.autograd.grad(ctx.layer(x), (x, *params), grad, allow_unused=True)
        return None, *grads


class Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = _Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        params = [p for p in self.layer.parameters() if p.requires_grad]
        return _Recompute.apply(self.layer, _Recompute.apply(self.layer, x, *params), *params)


class _Noted(torch.autograd.Function):
    """Notes its input in the context, without `save_for_backward`."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.x, ctx.params = layer, x, params
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.layer(x), (x, *ctx.params), grad)


class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(_Noted.apply(self.layer, x, *self.layer.parameters()))


class _Couple(torch.autograd.Function):
    """A reversible layer: its inputs are computed from its outputs, and the parts run again."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, g: nn.Module, a: torch.Tensor, b: torch.Tensor, *params: torch.Tensor) -> Any:
        ctx.f, ctx.g = f, g
        with torch.no_grad():
            a = a + f(b)
            b = b + g(a)
        ctx.save_for_backward(a, b, *params)
        return a, b

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        a, b, *params = ctx.saved_tensors
        with torch.no_grad():
            b = b - ctx.g(a)
            a = a - ctx.f(b)
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            y = a + ctx.f(b)
            z = b + ctx.g(y)
            return None, None, *torch.autograd.grad((y, z), (a, b, *params), grads, allow_unused=True)


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = _Couple.apply(self.f, self.g, x, 2 * x, *self.parameters())
        return a * b


class _Functional(torch.autograd.Function):
    """In the style that `torch.func` takes."""

    @staticmethod
    def forward(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer, x, _, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, grad @ ctx.layer.weight, grad.mT @ x, grad.sum(0)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(_Functional.apply(self.layer, x, self.layer.weight, self.layer.bias))


class Adjoint(nn.Module):
    """Steps of Euler's method, differentiated by the adjoint equation."""

    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def step(self, y: torch.Tensor) -> torch.Tensor:
        return y + 0.1 * self.field(y)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            y = _Recompute.apply(_Step(self), y, *self.parameters())
        return y


class _Step:
    def __init__(self, module: Adjoint):
        self.module = module

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return self.module.step(y)


def _hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    module[1].register_full_backward_hook(lambda part, grad_in, grad_out: (grad_in[0] * module[0].bias.detach(),))
    return module


class TensorHook(nn.Module):
    """A hook of an intermediate tensor reads a weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        if y.requires_grad:
            y.register_hook(lambda grad: grad * self.linear.bias.detach())
        return y


REENTERING = {
    "checkpoint": Checkpointed,
    "nested checkpoints": NestedCheckpoints,
    "segments": Segments,
    "recomputing": Recomputing,
    "noted in the context": Noting,
    "reversible": Reversible,
    "functional": Functional,
    "adjoint": Adjoint,
    "backward hook": _hooked,
    "hook of a tensor": TensorHook,
}
