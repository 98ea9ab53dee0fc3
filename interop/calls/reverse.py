"""Reverse mode through `torch.autograd`, which supports more of torch than `torch.func` does.

Everything here may run inside an outer `torch.autograd` graph and is differentiable again when gradients are enabled.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from ..wording import says_no_second_derivative

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]


Rows = Literal["never", "where needed", "always"]


def pullback(function: Function, xs: Tensors, cotangents: Tensors, *, audited: bool = False) -> Tensors:
    """`J^H ct`, in torch's convention; `audited`: see `gradients`."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outs, leaves = _forward(function, xs)
        if create_graph:  # torch marks what cannot be differentiated again only where cotangents require gradients
            cotangents = tuple(ct if ct.requires_grad else ct.detach().requires_grad_() for ct in cotangents)
        return gradients(outs, leaves, cotangents, create_graph=create_graph, audited=audited)


def pushforward(
    function: Function, xs: Tensors, tangents: Tensors, *, rows: Rows = "where needed", audited: bool = False
) -> Tensors:
    """`J t` by reverse mode alone: the pullback of the pullback, or row by row where torch cannot repeat it."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if rows != "always":
            try:
                return _twice(function, xs, tangents, create_graph=create_graph, audited=audited)
            except RuntimeError as exc:
                if rows == "never" or not cannot_repeat(exc):
                    raise
        outs, leaves = _forward(function, xs)
        return tuple(_rows(y, leaves, tangents, create_graph=create_graph, audited=audited) for y in outs)


def cannot_repeat(failure: RuntimeError) -> bool:
    """Whether what failed was torch's backward pass of a backward pass."""
    return says_no_second_derivative(str(failure)) or _CUT in str(failure)


_CUT = "torch cuts the graph of gradients"


def _twice(function: Function, xs: Tensors, tangents: Tensors, *, create_graph: bool, audited: bool) -> Tensors:
    outs, leaves = _forward(function, xs)
    # ct -> J^H ct is linear, so its own pullback, at any ct, is t -> J t. Some formulas take logarithms of ct.
    cotangents = tuple(torch.full_like(y, 2**-7).requires_grad_() for y in outs)
    grads = gradients(outs, leaves, cotangents, create_graph=True, audited=audited)
    return gradients(grads, cotangents, tangents, create_graph=create_graph, audited=audited)


def _rows(out: torch.Tensor, leaves: Tensors, tangents: Tensors, *, create_graph: bool, audited: bool) -> torch.Tensor:
    """`J t` one output element at a time: each row of `J` is a gradient."""

    def element(cotangent: torch.Tensor) -> torch.Tensor:
        cotangent.requires_grad_(create_graph)
        rows = gradients((out,), leaves, (cotangent,), create_graph=create_graph, retain_graph=True, audited=audited)
        return sum((torch.sum(r.conj() * t).real for r, t in zip(rows, tangents, strict=True)), torch.zeros(()))

    basis = torch.eye(out.numel(), dtype=out.dtype, device=out.device).reshape(-1, *out.shape)
    elements = [torch.complex(element(e), element(1j * e)) if out.is_complex() else element(e) for e in basis]
    return torch.stack(elements).reshape(out.shape).to(out.dtype) if elements else torch.zeros_like(out)


def gradients(
    outs: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    create_graph: bool,
    retain_graph: bool | None = None,
    audited: bool = False,
) -> Tensors:
    """`torch.autograd.grad`, giving zeros where `outs` do not depend on `xs`.

    If `audited`, it raises a `RuntimeError` where a backward formula gives gradients that cannot be differentiated.
    """
    pairs = [(y, ct) for y, ct in zip(outs, cotangents, strict=True) if y.requires_grad]
    if not pairs or not xs:
        return tuple(torch.zeros_like(x) for x in xs)
    with _audit([y for y, _ in pairs]) if audited and create_graph else contextlib.nullcontext():
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            xs,
            [ct for _, ct in pairs],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    if create_graph:
        refuse_dead_ends([g for g in grads if g is not None])
    return tuple(torch.zeros_like(x) if g is None else dense(g) for g, x in zip(grads, xs, strict=True))


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as JAX has it: `nn.Embedding(sparse=True)` and products with sparse matrices make sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


@contextlib.contextmanager
def _audit(outs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Raise where a gradient does not depend on the one before, in which it is linear: it was cut off from it."""
    cuts: list[str] = []

    def watch(node: Any) -> Any:
        def check(grad_inputs: Sequence[torch.Tensor | None], grad_outputs: Sequence[torch.Tensor | None]) -> None:
            if any(g is not None and g.requires_grad for g in grad_outputs):
                cuts.extend(node.name() for g in grad_inputs if g is not None and not g.requires_grad and g.any())

        return node.register_hook(check)

    handles = [watch(node) for node in nodes(outs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if cuts:
        raise RuntimeError(
            f"{_CUT} at {cuts[0]}, whose own derivative would be zero without a word. Compute by other ops what that "
            "is the backward pass of, or differentiate once only."
        )


def nodes(tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    """The nodes of the graph of tensors."""
    seen: set[Any] = set()
    nodes = [x.grad_fn for x in tensors]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


def refuse_dead_ends(grads: Sequence[torch.Tensor]) -> None:
    """Raise where a backward formula marked `once_differentiable` cuts the graph of gradients.

    torch puts an error there, but never reaches it: what lies behind is taken for unused, its gradient for zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes(grads)):
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def conj(tensors: Tensors) -> Tensors:
    """From torch's gradients to JAX's cotangents and back: complex ones are each other's conjugate."""
    # Resolved: the imaginary part of a lazy conjugate is a negative view, which torch.func.vmap cannot batch.
    return tuple(t.conj().resolve_conj() if t.is_complex() else t for t in tensors)


def _forward(function: Function, xs: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs, and aliases of `xs` as the graph's leaves: the gradient of an alias is not mixed up with other
    uses of the same tensor."""
    leaves = tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in xs)
    return function(*leaves), leaves
