"""`python -m torchleaf`: what `torchleaf.doctor` finds; `python -m torchleaf check ...`: what `torchleaf.check` does.

The exit status is 1 where something is broken, or not as in torch.
"""

import sys

from .interop.doctor.doctor import doctor
from .layers.check.command import main as check

_USAGE = "usage: python -m torchleaf [check package.module:factory]"


def main(arguments: list[str]) -> int:
    """Run a command; the exit status."""
    if arguments and arguments[0] == "check":
        return check(arguments[1:])
    if arguments:
        print(_USAGE)
        return 0 if arguments[0] in ("-h", "--help") else 2
    report = doctor()
    print(report)
    return not report.ok


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
