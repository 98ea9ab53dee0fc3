"""What all tests of GPUs run with."""

import pytest
from on_gpu import full_precision


@pytest.fixture(autouse=True)
def _full_precision():
    with full_precision():
        yield
