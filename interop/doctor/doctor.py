"""`doctor`: whether torchleaf works here, and what to do where it does not."""

import warnings
from collections.abc import Mapping

from .cuda_libraries import CudaLibraries
from .environment import Backend, Cache, GpuMemory, Gpus, Settings, Threads
from .probes import Call, Transport, Views
from .report import Check, Finding, Report, quoted
from .versions import Versions

_CHECKS: dict[str, type[Check]] = {
    "versions": Versions,
    "jax platform": Backend,
    "gpus": Gpus,
    "torch calls": Transport,
    "shared memory": Views,
    "numbers": Call,
    "cuda libraries": CudaLibraries,  # after the calls: both have loaded theirs by then
    "gpu memory": GpuMemory,  # after the calls: JAX has taken its part by then
    "threads": Threads,
    "settings": Settings,
    "compilation cache": Cache,
}


def doctor() -> Report:
    """Whether torchleaf works here: versions, devices, shared memory, a torch call, settings.

    Starts JAX and torch as your program would, and runs two small torch calls. `python -m torchleaf` prints the
    report, and its exit status is 1 where something is broken.

    **Arguments:** none.

    **Returns:** a report to print, with `ok`, whether nothing is broken, and `findings`: each has a `name`, a `value`,
    a `status` (`"ok"`; `"note"`, works and is worth knowing; `"problem"`, works worse than it could; `"broken"`, does
    not work) and, where that is not `"ok"`, a `remedy`. A check that raises is a finding too.
    """
    return examine(_CHECKS)


def examine(checks: Mapping[str, type[Check]]) -> Report:
    """The findings of all checks, by the names under which a check that raises is reported."""
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report
        for name, check in checks.items():
            try:
                findings += check.gather().findings()
            except Exception as exc:
                findings.append(_failed(name, exc, findings))
    return Report(tuple(findings))


def _failed(name: str, exc: Exception, before: list[Finding]) -> Finding:
    """A check that raised; what is already in the report is not said again."""
    error = quoted(exc)
    for finding in before:
        if error in finding.value:
            return Finding(name, f"the same error as '{finding.name}'", "broken", "See there.")
    return Finding(name, error, "broken", "If nothing above explains it, report it together with this page.")
