"""Random numbers that torch code draws past torch, from NumPy's global generator: no key drives them."""

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def numpy_generator_watched(name: str) -> Iterator[None]:
    """Warns if NumPy's global generator moves meanwhile, and puts it back."""
    before = np.random.get_state()
    yield
    if not all(map(np.array_equal, before, np.random.get_state())):
        np.random.set_state(before)
        warnings.warn(
            f"{name} draws from numpy.random, or another thread did while it was traced. No key drives that generator: "
            "results differ from call to call, and a forward pass that is run again for its gradient draws other "
            "numbers. Draw by torch, or switch it off (in transformers, apply_spec_augment=False).",
            stacklevel=3,
        )


@contextlib.contextmanager
def host_generators_kept() -> Iterator[None]:
    """Around runs that nobody asked for: what they draw from Python's and NumPy's generators is drawn again."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
