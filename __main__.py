"""`python -m torchleaf`: print what `torchleaf.doctor` finds; the exit status is 1 where something is broken."""

import sys

from .interop.doctor import doctor

if __name__ == "__main__":
    report = doctor()
    print(report)
    sys.exit(not report.ok)
