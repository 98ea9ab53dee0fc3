"""The report of `check`: an outcome for each check, and how they print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...interop.doctor.report import lines_of

Status = Literal["ok", "slow", "refused", "wrong", "error", "n/a"]


@dataclass(frozen=True)
class Outcome:
    """What one check gave.

    **Attributes:**

    - `name`: the check.
    - `status`: `"ok"`; `"slow"`, right, and slower than it could be; `"refused"`, an error of torchleaf's; `"wrong"`,
      numbers that are not torch's; `"error"`, another exception; `"n/a"`, there is nothing to check, or torch cannot do
      it itself.
    - `text`: why, or where and by how much; with `"refused"` and `"slow"` the library's own words, remedy included.
    - `error`: the largest relative error, with `"ok"` and `"slow"`.
    - `seconds`: how long the check took.
    """

    name: str
    status: Status
    text: str = ""
    error: float | None = None
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong or refused."""
        return self.status in ("ok", "slow", "n/a")


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks; `print` it.

    **Attributes:**

    - `name`: what was checked.
    - `outcomes`: in the order in which they are printed.
    - `notes`: how it was checked, where that is not as it was given.
    - `ok`: whether nothing is wrong, and nothing that torch can do is refused. What is slow or not applicable is good.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(outcome.is_good for outcome in self.outcomes)

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of a check, by its name."""
        found = {outcome.name: outcome for outcome in self.outcomes}
        if name not in found:
            raise KeyError(f"{name!r}; there are {list(found)}.")
        return found[name]

    def __str__(self) -> str:
        column = max((len(outcome.name) for outcome in self.outcomes), default=0)
        notes = [lines_of("note", "", note, "", column) for note in self.notes]
        first = {outcome.text: outcome.name for outcome in reversed(self.outcomes)}  # the others refer to it
        rows = [_row(outcome, first[outcome.text], column) for outcome in self.outcomes]
        return "\n".join([self.name, "", *rows, *notes, "", _summary(self.outcomes)])


def _row(outcome: Outcome, first: str, column: int) -> str:
    text = outcome.text if outcome.name == first or len(outcome.text) < _SHORT else f"As '{first}'."
    if outcome.error is None:
        return lines_of(outcome.status, outcome.name, text, "", column)
    value = f"{f'{outcome.error:.0e}' if outcome.error else 'exact'}, {outcome.seconds:.1f} s"
    return lines_of(outcome.status, outcome.name, value, text, column)


_SHORT = 70  # characters


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts = {s: sum(outcome.status == s for outcome in outcomes) for s in ("wrong", "error", "refused", "slow")}
    found = [f"{n} {status}" for status, n in counts.items() if n]
    return f"{', '.join(found)}." if found else "All is as in torch."
