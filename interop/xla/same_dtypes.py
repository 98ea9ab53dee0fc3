"""Operands that torch's kernels want in one dtype: fake tensors do not look, and JAX would promote them."""

from collections.abc import Mapping
from typing import Any

import torch

from ..modes.aten import bound

_IN_ONE_DTYPE = {
    **dict.fromkeys(("mm", "bmm"), ("self", "mat2")),
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "mv": ("self", "vec"),
    **dict.fromkeys(("addbmm", "baddbmm"), ("self", "batch1", "batch2")),
    "dot": ("self", "tensor"),
    **dict.fromkeys(("vdot", "linalg_cross", "allclose"), ("self", "other")),
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(("convolution", "_convolution"), ("input", "weight", "bias")),
    "heaviside": ("self", "values"),
    "complex": ("real", "imag"),
    "polar": ("abs", "angle"),
    **dict.fromkeys(("index_copy", "index_add", "index_reduce", "put"), ("self", "source")),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), ("self", "values")),
    "binary_cross_entropy": ("self", "target", "weight"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss"), ("self", "weight")),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), ("input", "grid")),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), ("weight", "per_sample_weights")),
    "_cdist_forward": ("x1", "x2"),
}
_NORMS = {
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), ("input", "weight", "bias")),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"),
        ("input", "weight", "bias", "running_mean", "running_var"),
    ),
}
"""In which an input of half precision may have parameters of single."""


class DtypesDiffer(RuntimeError):
    """torch's kernel would refuse this op."""


def refuse_other_dtypes(name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise where torch would, at an op by its name in the table."""
    base, _, overload = name.partition(".")
    wanted = _IN_ONE_DTYPE.get(base) or _NORMS.get(base)
    if wanted is None or overload == "dtype":  # whose results have another one
        return
    arguments = bound(func, args, dict(kwargs))
    given = {n: arguments[n].dtype for n in wanted if isinstance(arguments.get(n), torch.Tensor)}
    first, *others = given.values()
    fitting = {first} if base in _IN_ONE_DTYPE or first not in _HALF else {first, torch.float32}
    if not fitting.issuperset(others):
        shown = ", ".join(f"{n}: {str(dtype).removeprefix('torch.')}" for n, dtype in given.items())
        raise DtypesDiffer(f"the operands of {func} must have the same dtype, but got {shown}")


_HALF = (torch.float16, torch.bfloat16)
