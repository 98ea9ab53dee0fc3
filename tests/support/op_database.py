"""Cases from torch's operator database: functions of tensors, and what torch itself says of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST_ELEMENTS = 400
"""Of a sample's tensors: larger ones cost time and show nothing more."""

Tensors = tuple[torch.Tensor, ...]


def operators(dtype: torch.dtype) -> list[Any]:
    """Those of the database that take a dtype."""
    return [op for op in op_db if dtype in op.supported_dtypes("cpu")]


def name_of(op: Any) -> str:
    """A name of an operator that no other has."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def is_inexact(x: Any) -> bool:
    """Whether x is a tensor with derivatives."""
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


@dataclass(frozen=True)
class Case:
    """An operator on a sample: a function of those of the sample's tensors by which torch differentiates.

    All derivatives are of one number, the sum of the function's outputs with weights, along the directions `u` and `v`.
    """

    function: Callable[..., Tensors]
    operands: Tensors

    @cached_property
    def outputs(self) -> Tensors:
        """What the function returns."""
        return self.function(*(x.clone() for x in self.operands))

    @cached_property
    def weights(self) -> dict[int, torch.Tensor]:
        """One for each inexact output."""
        return {i: _normal(y, 100 + i) for i, y in enumerate(self.outputs) if is_inexact(y)}

    @cached_property
    def u(self) -> Tensors:
        """A direction."""
        return tuple(_normal(x, i) for i, x in enumerate(self.operands))

    @cached_property
    def v(self) -> Tensors:
        """Another one."""
        return tuple(_normal(x, 50 + i) for i, x in enumerate(self.operands))

    def near(self, seed: int) -> Tensors:
        """Other operands near those of the sample, where the operator is defined as well."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(x * (1 + 0.01 * torch.rand(x.shape, generator=generator).to(x.dtype)) for x in self.operands)

    def at(self, operands: Sequence[torch.Tensor]) -> "Case":
        """The same function at other operands."""
        return Case(self.function, tuple(operands))

    @cached_property
    def gradient(self) -> Tensors | None:
        """JAX's gradient, by torch.autograd; None where nothing depends on the operands."""
        leaves = [x.clone().requires_grad_() for x in self.operands]
        outs = self.function(*leaves)
        total = sum(inner(w, outs[i]) for i, w in self.weights.items())
        if not (isinstance(total, torch.Tensor) and total.requires_grad):
            return None
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g.conj().resolve_conj()
            for g, x in zip(grads, self.operands, strict=True)
        )

    def curvature(self, step: float) -> float:
        """The second derivative along `u` and `v`: a difference of gradients."""
        ahead, behind = (
            self.at([x + s * v for x, v in zip(self.operands, self.v, strict=True)]).slope for s in (step, -step)
        )
        return (ahead - behind) / (2 * step)

    @property
    def jumps(self) -> bool:
        """Whether the gradient is another one right beside the operands."""
        slopes = [
            self.slope,
            *(self.at([x + s * v for x, v in zip(self.operands, self.v, strict=True)]).slope for s in (1e-7, -1e-7)),
        ]
        return max(slopes) - min(slopes) > 1e-3 * max(*map(abs, slopes), 1e-3)

    @property
    def slope(self) -> float:
        """The derivative along `u`."""
        assert self.gradient is not None
        return float(sum(inner(g.conj(), u) for g, u in zip(self.gradient, self.u, strict=True)))

    @property
    def largest_slope(self) -> float:
        """What it would be if no parts of it cancelled."""
        assert self.gradient is not None
        return float(sum((_wide(g) * _wide(u)).abs().sum() for g, u in zip(self.gradient, self.u, strict=True)))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The real inner product, half precision in single."""
    a, b = _wide(a), _wide(b)
    return (a.conj() * b).sum().real if a.is_complex() or b.is_complex() else (a * b).sum()


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor in single precision at least: torch has no sums of complex numbers in half."""
    return x.to(torch.promote_types(x.dtype, torch.complex64 if x.is_complex() else torch.float32))


def cases(op: Any, dtype: torch.dtype, most: int) -> Iterator[Case]:
    """A few samples of an operator, spread over all that are small."""
    torch.manual_seed(0)
    samples = op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd)
    samples = [s for s in samples if 0 < sum(x.numel() for x in _tensors(s)) <= MOST_ELEMENTS]
    for i in range(min(most, len(samples))):
        yield _case(op, samples[i * len(samples) // min(most, len(samples))])


def _case(op: Any, sample: Any) -> Case:
    leaves, treedef = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, x in enumerate(leaves) if is_inexact(x) and (x.requires_grad or not op.supports_autograd)]
    leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]

    def function(*tensors: torch.Tensor) -> Tensors:
        given = [x.clone() if is_inexact(x) else x for x in leaves]  # running statistics are written into
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        first, args, kwargs = tree_unflatten(given, treedef)
        output = op.gradcheck_wrapper(op.op, first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            output = sample.output_process_fn_grad(output)
        return tuple(y for y in tree_flatten(output)[0] if isinstance(y, torch.Tensor))

    return Case(function, tuple(leaves[i] for i in places))


def _tensors(sample: Any) -> list[torch.Tensor]:
    leaves, _ = tree_flatten((sample.input, sample.args, sample.kwargs))
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def _normal(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def plain_attention() -> Any:
    """torch's attention with all its derivatives."""
    return sdpa_kernel(SDPBackend.MATH)
