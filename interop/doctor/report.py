"""The report of `doctor`: findings, and how they print."""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem", "broken"]

_WIDTH = 100  # of a line
_QUOTE = 300  # characters of an exception: torch's message comes before its traceback


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    **Attributes:**

    - `name`: what was looked at.
    - `value`: what was found.
    - `status`: `"ok"`; `"note"` (works, and is worth knowing); `"problem"` (works worse than it could); `"broken"`
      (does not work).
    - `remedy`: what to do, where the status is not `"ok"`.
    """

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings; `print` it.

    **Attributes:**

    - `findings`: in the order in which they are printed.
    - `ok`: whether nothing is broken.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(f.status == "broken" for f in self.findings)

    def __str__(self) -> str:
        column = max((len(f.name) for f in self.findings), default=0)
        lines = [lines_of(f.status, f.name, f.value, f.remedy, column) for f in self.findings]
        return "\n".join([*lines, "", _summary(self.findings)])


class Check(ABC):
    """Facts of one kind: `gather` asks the process, `findings` follow from the facts alone."""

    @classmethod
    @abstractmethod
    def gather(cls) -> "Check": ...

    @abstractmethod
    def findings(self) -> list[Finding]: ...


def quoted(exc: BaseException) -> str:
    """An exception in one line, to be followed by a full stop."""
    text = textwrap.shorten(str(exc), _QUOTE, placeholder=" ...").removesuffix(".")
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def lines_of(status: str, name: str, value: str, remedy: str, column: int) -> str:
    """A finding in lines; names take up to `column` characters."""
    head = f"{status:<9}{name:<{column}}  "
    indent = " " * len(head)
    lines = [(head, value)] + [(f"{indent}-> ", line) for line in remedy.splitlines()]
    return "\n".join(
        textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
        for first, text in lines
    )


def _summary(findings: Sequence[Finding]) -> str:
    counts = {status: sum(f.status == status for f in findings) for status in ("broken", "problem", "note")}
    if not any(counts.values()):
        return "All is well."
    plural = {"broken": "broken", "problem": "problems", "note": "notes"}
    return ", ".join(f"{n} {status if n == 1 else plural[status]}" for status, n in counts.items()) + "."
