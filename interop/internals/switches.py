"""Switches of torch, each with what asks and what sets it."""

from collections.abc import Callable
from typing import Any

import torch

_C: Any = torch._C
_functorch: Any = _C._functorch

ONEDNN: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._get_mkldnn_enabled, _C._set_mkldnn_enabled)
CUDNN: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._get_cudnn_enabled, _C._set_cudnn_enabled)
"""Whether a library is used, and what sets it: `torch.backends` refuses to where torch's test tools are imported."""

VMAP_FALLBACK: tuple[Callable[[], bool], Callable[[bool], None]] = (
    _functorch._is_vmap_fallback_enabled,
    _functorch._set_vmap_fallback_enabled,
)
"""Whether `torch.func.vmap` loops over ops without a rule, with a warning each; fake runs want an error."""

FORWARD_GRAD: tuple[Callable[[], bool], Callable[[bool], None]] = (_C._is_fwd_grad_enabled, _C._set_fwd_grad_enabled)
"""Whether this thread's ops carry tangents; `torch.no_grad` alone does not stop them."""
