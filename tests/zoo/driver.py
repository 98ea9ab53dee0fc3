"""A test for each specimen of a package: every check must be `ok`, or not be asked for a reason."""

import importlib.util
from collections.abc import Callable

import pytest

from .checks import CHECKS, Outcome, outcome_of
from .specimen import Specimen

INSTALL = 'pip install -c constraints.txt ".[zoo]"'


def zoo_test(package: str, *specimens: Specimen) -> Callable[[Specimen], None]:
    """The slow test of a package's modules, skipped where the package is not installed."""

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed: {INSTALL}")
    @pytest.mark.filterwarnings("ignore")  # packages warn of their own affairs; torchleaf's warnings are in the table
    @pytest.mark.parametrize("specimen", specimens, ids=lambda specimen: specimen.name)
    def test(specimen: Specimen) -> None:
        outcomes = examine(specimen)
        table = as_text(specimen, outcomes)
        print(table)
        assert all(outcome.status in ("ok", "not asked") for outcome in outcomes.values()), table

    return test


def examine(specimen: Specimen) -> dict[str, Outcome]:
    """The outcome of each check."""
    return {check: outcome_of(check, specimen) for check in CHECKS}


def as_text(specimen: Specimen, outcomes: dict[str, Outcome]) -> str:
    """A row for each check."""
    rows = [f"  {check:<24}{outcome.status:<10}{outcome.text}" for check, outcome in outcomes.items()]
    return "\n".join([f"\n{specimen.name}", *rows])
