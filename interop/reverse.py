"""Reverse mode through `torch.autograd`, which supports more of torch than `torch.func` does.

Everything here may run inside an outer `torch.autograd` graph and is differentiable again when gradients are enabled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]


def pullback(function: Function, xs: Tensors, cotangents: Tensors) -> Tensors:
    """`J^H ct`, in torch's convention."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outs, leaves = _forward(function, xs)
        if create_graph:  # torch marks what cannot be differentiated again only where cotangents require gradients
            cotangents = tuple(ct if ct.requires_grad else ct.detach().requires_grad_() for ct in cotangents)
        return gradients(outs, leaves, cotangents, create_graph=create_graph)


def pushforward(function: Function, xs: Tensors, tangents: Tensors) -> Tensors:
    """`J t` by reverse mode alone: the pullback of the pullback, or row by row where torch cannot repeat it."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        try:
            outs, leaves = _forward(function, xs)
            # ct -> J^H ct is linear, so its own pullback, at any ct, is t -> J t.
            cotangents = tuple(torch.zeros_like(y).requires_grad_() for y in outs)
            grads = gradients(outs, leaves, cotangents, create_graph=True)
            _refuse_cut_graphs(outs, leaves, grads)
            return gradients(grads, cotangents, tangents, create_graph=create_graph)
        except RuntimeError as exc:
            if not any(reason in str(exc) for reason in _ONCE_DIFFERENTIABLE):
                raise
        outs, leaves = _forward(function, xs)
        return tuple(_rows(y, leaves, tangents, create_graph=create_graph) for y in outs)


_ONCE_DIFFERENTIABLE = ("is not implemented", "once_differentiable")


def _refuse_cut_graphs(outs: Sequence[torch.Tensor], leaves: Tensors, grads: Tensors) -> None:
    """Raise where gradients depend on cotangents, but torch keeps no graph of it, as for `torch.cond`."""
    if all(g.requires_grad for g in grads) or not any(y.requires_grad for y in outs):
        return
    ones = tuple(torch.ones_like(y) for y in outs)
    probe = gradients(outs, leaves, ones, create_graph=False, retain_graph=True)
    if any(not g.requires_grad and bool(p.any()) for g, p in zip(grads, probe, strict=True)):
        raise RuntimeError("trying to differentiate twice what torch treats as once_differentiable")


def _rows(out: torch.Tensor, leaves: Tensors, tangents: Tensors, *, create_graph: bool) -> torch.Tensor:
    """`J t` one output element at a time: each row of `J` is a gradient."""

    def element(cotangent: torch.Tensor) -> torch.Tensor:
        rows = gradients((out,), leaves, (cotangent,), create_graph=create_graph, retain_graph=True)
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
) -> Tensors:
    """`torch.autograd.grad`, giving zeros where `outs` do not depend on `xs`."""
    pairs = [(y, ct) for y, ct in zip(outs, cotangents, strict=True) if y.requires_grad]
    if not pairs or not xs:
        return tuple(torch.zeros_like(x) for x in xs)
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        xs,
        [ct for _, ct in pairs],
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    if create_graph:
        _refuse_dead_ends([g for g in grads if g is not None])
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True))


def _refuse_dead_ends(grads: Sequence[torch.Tensor]) -> None:
    """Raise where a backward formula marked `once_differentiable` cuts the graph of gradients.

    torch puts an error there, but never reaches it: what lies behind is taken for unused, its gradient for zero.
    """
    seen: set[Any] = set()
    nodes = [g.grad_fn for g in grads]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def conj(tensors: Tensors) -> Tensors:
    """From torch's gradients to JAX's cotangents and back: complex ones are each other's conjugate."""
    # Resolved: the imaginary part of a lazy conjugate is a negative view, which torch.func.vmap cannot batch.
    return tuple(t.conj().resolve_conj() if t.is_complex() else t for t in tensors)


def _forward(function: Function, xs: Tensors) -> tuple[Tensors, Tensors]:
    """Outputs, and aliases of `xs` as the graph's leaves: the gradient of an alias is not mixed up with other
    uses of the same tensor."""
    leaves = tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in xs)
    return function(*leaves), leaves
