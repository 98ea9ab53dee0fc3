"""Zero tensors: torch's tangents of what has none, which have a shape and no memory.

Kernels that write into one raise an error. Where a dispatch mode is entered they come past the check that would have
given them memory, and kernels that read it crash the process. So within every dispatch mode of ours they are made
with memory, and in forward mode where torch says that one was to be written.
"""

from typing import Any

import torch

_aten = torch.ops.aten


def with_memory(op: Any) -> Any:
    """The op to be called in the place of one that a dispatch mode sees."""
    return _aten.zeros.default if op is _aten._efficientzerotensor.default else op
