"""Ops whose derivatives torch has wrong, composed of others.

No proof can find these (`proof.py`), for torch.autograd itself has them wrong, in torch 2.13:

- weight norm: `torch.autograd.gradgradcheck` fails for `torch._weight_norm`;
- layer and batch norm: their backward's backward takes means and deviations that were saved for constants, so that its
  own derivative is wrong; the third derivative, that is, and the second where it is made of these;
- `native_layer_norm` and `native_batch_norm`, whose means and deviations are outputs, constants to torch: the forward
  mode of the former fails;
- determinants: under `vmap` or in a dispatch mode, as replays are recorded in, their backward chooses between a formula
  for regular and one for singular matrices after computing both, of which the latter gives NaN where singular values
  are equal, at the identity for instance;
- `logcumsumexp`: so is its backward's backward, by logarithms of gradients that are zero;
- `linear_cross_entropy` in chunks: its second derivative is zero.

Composed of plain ops they are slower, and right; they are so from the order on that needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..internals.ops import BATCH_NORM, WEIGHT_NORM
from .function_modes import FunctionMode

Optional = torch.Tensor | None

MARKS = {
    "weight norm": ("_weight_norm",),
    "layer norm": ("native_layer_norm",),
    "native layer norm": ("native_layer_norm",),
    "batch norm": ("batch_norm", "instance_norm"),
    "determinant": ("_linalg_det",),
    "logcumsumexp": ("logcumsumexp",),
    "linear cross entropy": ("linear_cross_entropy",),
}
"""What tells the op of a formula by its name."""
WRONG = frozenset(MARKS)
WRONG_TWICE = WRONG - {"layer norm", "batch norm"}
"""Those that are wrong in second derivatives already."""


class Composed(FunctionMode):
    """Within it, calls of ops by these formulas are composed of others."""

    def __init__(self, formulas: frozenset[str]):
        super().__init__()
        self._functions = {f: composed for name in formulas for f, composed in _FUNCTIONS[name].items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._functions.get(func) or func)(*args, **(kwargs or {}))


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Optional = None,
    bias: Optional = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    normed = _standardised(x, range(-len(normalized_shape), 0), eps)
    return _affine(normed, weight, bias, normalized_shape).to(x.dtype)


def _native_layer_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: Optional, bias: Optional, eps: float
) -> tuple[torch.Tensor, ...]:
    wide, dims = _wide(x.detach()), tuple(range(-len(normalized_shape), 0))
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True)
    return _layer_norm(x, normalized_shape, weight, bias, eps), mean, torch.rsqrt(var + eps)


def _native_batch_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    """One that returns statistics, and writes into running ones if it is given any."""

    def run(x: torch.Tensor, weight: Optional, bias: Optional, *rest: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        constants = [t.detach() if isinstance(t, torch.Tensor) else t for t in (x, weight, bias)]
        *running, momentum, eps = rest
        mean, var = (s.clone() if isinstance(s, torch.Tensor) else None for s in (*running[:2], None, None)[:2])
        training = next((r for r in running if isinstance(r, bool)), True)
        _, *statistics = function(*constants, *rest, **named)
        return _batch_norm(x, mean, var, weight, bias, training, momentum, eps), *statistics

    return run


def _batch_norm(
    x: torch.Tensor,
    running_mean: Optional,
    running_var: Optional,
    weight: Optional = None,
    bias: Optional = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    statistics, of_channels = (running_mean, running_var), (-1, *(1,) * (x.ndim - 2))
    if training:
        normed = _standardised(x, [0, *range(2, x.ndim)], eps)
        _update(torch.batch_norm, x, statistics, momentum, eps)
    else:
        mean, var = (s.view(of_channels) for s in statistics if s is not None)
        normed = (x - mean) * torch.rsqrt(var + eps)
    return _affine(normed, weight, bias, of_channels).to(x.dtype)


def _instance_norm(
    x: torch.Tensor,
    running_mean: Optional = None,
    running_var: Optional = None,
    weight: Optional = None,
    bias: Optional = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    normed = _standardised(x, range(2, x.ndim), eps)
    _update(torch.instance_norm, x, (running_mean, running_var), momentum, eps)
    return _affine(normed, weight, bias, (-1, *(1,) * (x.ndim - 2))).to(x.dtype)


def _standardised(x: torch.Tensor, dims: Sequence[int], eps: float) -> torch.Tensor:
    centred = _wide(x) - _wide(x).mean(tuple(dims), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(tuple(dims), keepdim=True) + eps)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(x: torch.Tensor, weight: Optional, bias: Optional, shape: Sequence[int]) -> torch.Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _update(
    norm: Callable[..., Any], x: torch.Tensor, statistics: tuple[Optional, Optional], momentum: float, eps: float
) -> None:
    """Let torch write into running statistics."""
    if statistics[0] is not None:
        norm(x.detach(), None, None, *statistics, True, momentum, eps, False)


def _determinant(a: torch.Tensor) -> torch.Tensor:
    """Each formula gets a matrix of its own kind in the place of others, so that nothing of it is NaN."""
    n = a.shape[-1]
    singular = (torch.linalg.det(a.detach()).abs() < torch.finfo(a.dtype).eps)[..., None, None]
    one = torch.eye(n, dtype=a.dtype, device=a.device)
    distinct = torch.arange(1, n + 1, device=a.device).to(a.dtype).diag()
    sign, log = torch.linalg.slogdet(torch.where(singular, one, a))
    return torch.where(singular[..., 0, 0], torch.linalg.det(torch.where(singular, a, distinct)), sign * log.exp())


def _logcumsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    if not x.ndim:
        return x.clone()
    rows = x.movedim(dim, -1)
    later = torch.ones(rows.shape[-1], rows.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return rows.unsqueeze(-2).masked_fill(later, -torch.inf).logsumexp(-1).movedim(-1, dim)


def _unchunked(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, options: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


def _of_aten(composed: Callable[..., Any]) -> Callable[..., Any]:
    """A batch or instance norm with arguments in the order of torch's op."""

    def run(x: torch.Tensor, weight: Optional, bias: Optional, mean: Optional, var: Optional, *rest: Any) -> Any:
        *options, _ = rest  # whether cuDNN may be used
        return composed(x, mean, var, weight, bias, *options)

    return run


_ATEN = (
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit,
    torch.ops.aten._batch_norm_with_update,
)
_NATIVE: tuple[Any, ...] = (
    *(torch.native_batch_norm, BATCH_NORM),
    *(f for packet in _ATEN for f in (packet, *(getattr(packet, name) for name in packet.overloads()))),
)

_FUNCTIONS: dict[str, dict[Any, Callable[..., Any]]] = {
    "weight norm": {WEIGHT_NORM: _weight_norm},
    "layer norm": {F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm},
    "native layer norm": {torch.native_layer_norm: _native_layer_norm},
    "batch norm": {
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        torch.batch_norm: _of_aten(_batch_norm),
        torch.instance_norm: _of_aten(_instance_norm),
        **{f: _native_batch_norm(f) for f in _NATIVE},
    },
    "determinant": dict.fromkeys((torch.linalg.det, torch.det, torch.Tensor.det), _determinant),
    "logcumsumexp": {torch.logcumsumexp: _logcumsumexp, torch.Tensor.logcumsumexp: _logcumsumexp},
    "linear cross entropy": {f: _unchunked(f) for f in [getattr(F, "linear_cross_entropy", None)] if f is not None},
}
