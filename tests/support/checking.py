"""Checks one at a time, which takes less time than `torchleaf.check`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from torchleaf.layers.check.bench import Bench
from torchleaf.layers.check.given import Given
from torchleaf.layers.check.kinds import kind_of
from torchleaf.layers.check.outcomes import CHECKS, outcome_of
from torchleaf.layers.check.report import Outcome
from torchleaf.layers.check.untouched import untouched

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def outcome(name: str, given: Any, *args: Any, key: Any = None) -> Outcome:
    """That of one check."""
    with untouched():
        return outcome_of(name, CHECKS[name], Bench(Given(kind_of(given, None), args, key)))
