"""Cases from torch's operator database, and what torch itself says of each: values, gradients, finite differences."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST_ELEMENTS = 400
"""Of a sample's operands: larger ones cost time and show nothing more."""

Tensors = tuple[torch.Tensor, ...]


def operators(dtype: torch.dtype) -> list[Any]:
    """Those of the database that take a dtype."""
    return [op for op in op_db if dtype in op.supported_dtypes("cpu")]


def name_of(op: Any) -> str:
    """A name of an operator that no other has."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


@dataclass(frozen=True)
class Case:
    """An operator on a sample: a function of the sample's inexact tensors."""

    function: Callable[..., Tensors]
    operands: Tensors

    def moved(self, seed: int) -> Tensors:
        """Other operands, near those of the sample, which are where the operator is defined."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            x * (1 + 0.01 * torch.rand(x.shape, dtype=torch.float64, generator=generator)) for x in self.operands
        )


def cases(op: Any, dtype: torch.dtype, most: int) -> Iterator[Case]:
    """A few samples of an operator, spread over all that are small."""
    torch.manual_seed(0)
    samples = op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd)
    samples = [s for s in samples if 0 < _n_elements(s) <= MOST_ELEMENTS]
    n = min(most, len(samples))
    for i in range(n):
        yield _case(op, samples[i * len(samples) // n], dtype)


def _n_elements(sample: Any) -> int:
    leaves, _ = tree_flatten((sample.input, sample.args, sample.kwargs))
    return sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))


def _case(op: Any, sample: Any, dtype: torch.dtype) -> Case:
    leaves, treedef = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, x in enumerate(leaves) if _is_inexact(x) and (x.requires_grad or not op.supports_autograd)]
    leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]

    def function(*tensors: torch.Tensor) -> Tensors:
        given = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        first, args, kwargs = tree_unflatten(given, treedef)
        out = op.gradcheck_wrapper(op.op, first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            out = sample.output_process_fn_grad(out)
        return tuple(y for y in tree_flatten(out)[0] if isinstance(y, torch.Tensor))

    return Case(function, tuple(leaves[i] for i in places))


def _is_inexact(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
