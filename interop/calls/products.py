"""Products with a Jacobian and its transpose by the transforms of `torch.func`."""

import warnings
from collections.abc import Callable

import torch

from ..modes.forward_ad import one_at_a_time
from ..process.once import Once
from ..types import Tensors


@Once
def load_forward_mode() -> None:
    """torch compiles some formulas when it first needs any, with a deprecation warning of TorchScript's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


# torch.func.vjp gives a pullback that can be differentiated where gradients are enabled when it is called, as they are
# not in a running program: many backward formulas have a branch of their own for that, some of which are wrong under
# other transforms.


def forward_mode(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    """`J t`, by forward mode."""
    with one_at_a_time(), torch.enable_grad():
        return torch.func.jvp(function, xs, tangents)[1]


def reverse_twice(function: Callable[..., Tensors], xs: Tensors, tangents: Tensors) -> Tensors:
    """`J t`, as the pullback of the pullback."""
    with torch.enable_grad():
        outs, pullback, *_ = torch.func.vjp(function, *xs)
        # ct -> J^H ct is linear, so its own pullback, at any ct, is t -> J t. Some formulas take logarithms of ct.
        _, pushforward, *_ = torch.func.vjp(pullback, tuple(torch.full_like(y, 2**-7) for y in outs))
        return pushforward(tangents)[0]


def reverse_mode(function: Callable[..., Tensors], xs: Tensors, cotangents: Tensors) -> Tensors:
    """`J^H ct`, in torch's convention."""
    with torch.enable_grad():
        _, pullback, *_ = torch.func.vjp(function, *xs)
        return pullback(cotangents)
