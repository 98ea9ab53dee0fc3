"""Around all checks: what belongs to the whole process is left as it was before."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from ...interop.modes.host_random import host_generators_kept


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Puts torch's, Python's and NumPy's generators and torch's default dtype back; gradients are on within."""
    dtype = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's own code; the library's are remarks
        with host_generators_kept(), torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)
