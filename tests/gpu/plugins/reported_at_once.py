"""A pytest plugin: each failure is written down when it happens, for runs that are cut off."""

import sys


def pytest_runtest_logreport(report):
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = getattr(crash, "message", str(report.longrepr)).splitlines()[0][:300]
        sys.__stdout__.write(f"\nFAILED {report.nodeid}: {message}\n")
