"""Fixtures of the layer tests."""

import pytest


@pytest.fixture
def readable(engine, spec):
    """Leaves out modules that read values where XLA computes."""
    if engine == "xla" and spec.reads_values:
        pytest.skip("it reads values")
