"""`python -m torchleaf check package.module:factory`: the report for what a factory gives; 1 where it is not ok."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from . import check

USAGE = """\
usage: python -m torchleaf check package.module:factory

factory() returns what to pass to torchleaf.check: a module or function, or a tuple of one and its arguments. It may
also be such a tuple itself. The exit status is 1 where something is wrong or refused, 2 where nothing could be checked.
"""


class UsageError(Exception):
    """A command line that names nothing to check."""


def main(arguments: Sequence[str]) -> int:
    """Print the report, or what is wrong with the command line; the exit status."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        given = _given(arguments[0])
    except UsageError as exc:
        print(exc)
        return 2
    try:
        report = check(*given)
    except (TypeError, ValueError) as exc:  # of what cannot be checked
        print(exc)
        return 2
    print(report)
    return not report.ok


def _given(name: str) -> tuple[Any, ...]:
    """What the factory of this name gives, as a tuple."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"{name!r} is no `package.module:factory`.\n\n{USAGE}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise  # a module of the user's imports one that there is not
        raise UsageError(f"There is no module {exc.name!r}: give one that can be imported from here.") from None
    for part in path.split("."):
        if not hasattr(found, part):
            names = ", ".join(sorted(n for n, x in vars(found).items() if callable(x) and not n.startswith("_")))
            raise UsageError(f"{module_name} has no {path!r}; it has {names or 'no functions'}.")
        found = getattr(found, part)
    is_factory = callable(found) and not isinstance(found, torch.nn.Module)
    given = found() if is_factory else found
    given = given if isinstance(given, tuple | list) else (given,)
    if not given or not callable(given[0]):
        shown = type(given[0]).__name__ if given else "an empty tuple"
        raise UsageError(f"{name} gives {shown}; expected a module or function, or a tuple of one and its arguments.")
    return tuple(given)
