"""Each `torch.autograd.Function` that a callable applies: whether torch differentiates its gradient right.

torch takes for constants what the forward of one computes and its backward uses, unless that is one of its outputs; so
second derivatives lack a part, without a word. Only finite differences tell.

Source: [double backward](https://docs.pytorch.org/tutorials/intermediate/custom_function_double_backward_tutorial.html).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..modes.bound_in_c import node_being_made
from ..modes.function_applies import applications_heard_by
from ..modes.guard import is_plain_run
from ..values.dtypes import is_inexact_tensor
from .differences import OtherDerivativeError, check_slope, drawn_like, inner

_MOST, _MOST_ELEMENTS = 50, 2**20
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Application:
    """A function and what it was applied to; tensors are copies."""

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_differentiated: bool = False
    """Whether its gradient was computed, and not of zeros."""

    @property
    def key(self) -> Any:
        """What applications that one of them stands for have in common."""
        return self.function, tuple((x.shape, x.dtype) if _is_tensor(x) else None for x in self.args)

    def in_double(self) -> "Application":
        """The same, with all that is real in float64."""
        args = (x.detach().double().requires_grad_(x.requires_grad) if _is_real(x) else x for x in self.args)
        return replace(self, args=tuple(args))

    def note_gradient(self, outputs: Any) -> None:
        """See whether its gradient is computed from here on."""

        def note(gradients: Iterable[torch.Tensor | None]) -> None:
            self.is_differentiated |= any(g is not None and bool(g.detach().any()) for g in gradients)

        every = outputs if isinstance(outputs, tuple) else (outputs,)
        nodes = (output.grad_fn for output in every if _is_tensor(output) and output.grad_fn is not None)
        node = node_being_made() or next(nodes, None)
        if node is not None:
            node.register_prehook(note)


@contextlib.contextmanager
def applications() -> Iterator[list[Application]]:
    """Those within, outside of torch's transforms, to something that requires gradients."""
    found: list[Application] = []

    def note(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        if len(found) == _MOST or not _is_of_interest(args):
            return run(*args, **kwargs)
        copies = (x.detach().clone().requires_grad_(x.requires_grad) if _is_tensor(x) else x for x in args)
        found.append(Application(cls, tuple(copies), kwargs))
        outputs = run(*args, **kwargs)
        found[-1].note_gradient(outputs)
        return outputs

    with applications_heard_by(note):
        yield found


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _is_of_interest(args: tuple[Any, ...]) -> bool:
    tensors = list(filter(_is_tensor, args))
    is_small = sum(x.numel() for x in tensors) <= _MOST_ELEMENTS
    return is_small and torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and is_plain_run(tensors)


# --- the check -------------------------------------------------------------------------------------


def with_wrong_gradients(found: Iterable[Application]) -> str | None:
    """The name of a function whose gradient was computed, and is not differentiated right by torch."""
    different = {application.key: application for application in found if application.is_differentiated}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return next((a.function.__name__ for a in different.values() if _is_wrong(a)), None)


def _is_wrong(application: Application) -> bool:
    """Whether the derivative of its gradient is not that of finite differences: in float64, if it works there."""
    for given in (application.in_double(), application):
        try:
            _check(given)
        except OtherDerivativeError:
            return True
        except RuntimeError:  # torch says itself that it cannot
            continue
        return False
    return False


def _check(application: Application) -> None:
    """`OtherDerivativeError` if the derivative of `<weights, gradient>`, by what it is applied to, is another one."""
    xs = tuple(x.detach() for x in application.args if _is_tensor(x) and x.requires_grad)
    gradient, weights = _Gradient(application), _directions(xs, 0)
    point = tuple(x.requires_grad_() for x in (*xs, *drawn_like(gradient.outputs(xs), 1)))

    def gradients(*point: torch.Tensor) -> Tensors:
        return gradient.at(point[: len(xs)], point[len(xs) :])

    value = sum(((w * g).sum().real for w, g in zip(weights, gradients(*point), strict=True)), torch.zeros(()))
    slopes = torch.autograd.grad(value, point, materialize_grads=True)
    tangents = _directions(point, 2)
    check_slope(gradients, point, tangents, weights, inner(tuple(s.conj() for s in slopes), tangents))


def _directions(tensors: Tensors, seed: int) -> Tensors:
    """Random ones; those of symmetric matrices are symmetric, since formulas may rely on it."""
    pairs = zip(tensors, drawn_like(tensors, seed), strict=True)
    return tuple(d + d.mT if _is_symmetric(x.detach()) else d for x, d in pairs)


def _is_symmetric(x: torch.Tensor) -> bool:
    return x.ndim >= 2 and x.shape[-1] == x.shape[-2] and torch.allclose(x, x.mT)


class _Gradient:
    """The gradient of a function as a function of its arguments and of cotangents."""

    def __init__(self, application: Application):
        self._application = application

    def outputs(self, xs: Iterable[torch.Tensor]) -> Tensors:
        """The outputs that have gradients; `xs` take the places of the arguments that do."""
        given, each = self._application, iter(xs)
        args = [next(each).clone() if _is_tensor(x) and x.requires_grad else x for x in given.args]
        outs = given.function.apply(*args, **given.kwargs)
        every = outs if isinstance(outs, tuple) else (outs,)
        return tuple(y for y in every if _is_tensor(y) and is_inexact_tensor(y))

    def at(self, xs: Tensors, cotangents: Tensors) -> Tensors:
        """The gradients by `xs`, which can be differentiated."""
        with torch.enable_grad():
            leaves = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in xs)
            pairs = [(y, ct) for y, ct in zip(self.outputs(leaves), cotangents, strict=True) if y.requires_grad]
            outs, given = zip(*pairs, strict=True)
            return torch.autograd.grad(outs, leaves, given, create_graph=True, materialize_grads=True)
