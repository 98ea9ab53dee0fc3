"""A test for each specimen of a package: every check must be good, or not be asked for a reason."""

import importlib.util
from collections.abc import Callable, Mapping

import pytest
from torchleaf.layers.check.bench import Bench
from torchleaf.layers.check.outcomes import CHECKS, Check, outcomes_of
from torchleaf.layers.check.report import Outcome, Report
from torchleaf.layers.check.untouched import untouched

from .by_xla import by_xla
from .specimen import Specimen
from .training import training

INSTALL = 'pip install -c constraints.txt ".[zoo]"'

SPECIMENS: dict[str, list[Specimen]] = {}
"""Those of each package whose tests are imported."""


def zoo_test(package: str, *specimens: Specimen) -> Callable[[Specimen], None]:
    """The slow test of a package's modules, skipped where the package is not installed."""
    SPECIMENS.setdefault(package, []).extend(specimens)

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed: {INSTALL}")
    @pytest.mark.filterwarnings("ignore")  # packages warn of their own affairs; torchleaf's warnings are in the table
    @pytest.mark.parametrize("specimen", specimens, ids=lambda specimen: specimen.name)
    def test(specimen: Specimen) -> None:
        report = examine(specimen)
        print(report)
        wrong = [outcome.name for outcome in report.outcomes if not (outcome.is_good or may_be_refused(outcome))]
        assert not wrong, str(report)

    return test


FURTHER = {"training": training, "engine='xla'": by_xla}


def may_be_refused(outcome: Outcome) -> bool:
    """JAX alone need not have every op, if it says which it lacks."""
    return outcome.name == "engine='xla'" and outcome.status == "refused"


def examine(specimen: Specimen, checks: Mapping[str, Check] = CHECKS | FURTHER) -> Report:
    """The outcome of each check."""
    with untouched():
        return Report(specimen.name, tuple(outcomes_of(Bench(specimen), checks)))
