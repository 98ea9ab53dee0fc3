"""The measurements of runs, as `run.py` leaves them in results.json."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from contenders import BASELINE, CONTENDERS

FILE = "results.json"


class Results:
    """The measurements of runs on one machine, by case, task and contender.

    Of what several runs have measured, those of the last one count, beside that run's native torch.
    """

    def __init__(self, *directories: Path):
        self._rounds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        self._native: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for directory in directories:
            document = json.loads((directory / FILE).read_text())
            self.machine, self.settings = document["machine"], document["settings"]
            found = {(m["case"], m["task"], m["contender"]): m["rounds"] for m in document["measurements"]}
            self._rounds |= found
            self._native |= {key: found[*key[:2], BASELINE] for key in found}
        known = {contender for _, _, contender in self._rounds}
        self.contenders = [contender for contender in CONTENDERS if contender in known]
        self.tasks = sorted({task for _, task, _ in self._rounds})

    def cases(self, task: str) -> list[str]:
        return list(dict.fromkeys(case for case, t, _ in self._rounds if t == task))

    def rounds(self, case: str, task: str, contender: str) -> list[dict[str, Any]]:
        return self._rounds.get((case, task, contender), [])

    def error(self, case: str, task: str, contender: str) -> str | None:
        errors = [r["error"] for r in self.rounds(case, task, contender) if "error" in r]
        return errors[0] if errors else None

    def values(self, case: str, task: str, contender: str, field: str) -> list[float]:
        """One number per round; of `seconds`, the median of its samples."""
        rounds = [] if self.error(case, task, contender) else self.rounds(case, task, contender)
        return [_value(record, field) for record in rounds]

    def ratios(self, case: str, task: str, contender: str) -> list[float]:
        """Of times, to native torch's, round by round."""
        ours, native = self.values(case, task, contender, "seconds"), self._native.get((case, task, contender), [])
        return [a / _value(b, "seconds") for a, b in zip(ours, native, strict=False) if "error" not in b]

    def ratio(self, case: str, task: str, contender: str) -> float | None:
        """The median of them."""
        ratios = self.ratios(case, task, contender)
        return median(ratios) if ratios else None

    def versions(self) -> dict[str, dict[str, str]]:
        """What each contender ran with."""
        found: dict[str, dict[str, str]] = {}
        for (_, _, contender), rounds in self._rounds.items():
            for record in rounds:
                found.setdefault(contender, record.get("versions", {}))
        return found


def _value(record: dict[str, Any], field: str) -> float:
    return median(record[field]) if field == "seconds" else float(record[field])
