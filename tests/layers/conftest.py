"""Fixtures of the layer tests."""

import jaxtyping
import pytest


@pytest.fixture
def no_type_checks():
    """As users run: without the run-time type checks of the test suite, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def readable(engine, spec):
    """Leaves out modules that read values where XLA computes."""
    if engine == "xla" and spec.reads_values:
        pytest.skip("it reads values")
