"""The measurements of a run, as `run.py` leaves them in results.json."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from contenders import BASELINE

FILE = "results.json"


class Results:
    """The measurements of a run, by case, task and contender."""

    def __init__(self, directory: Path):
        document = json.loads((directory / FILE).read_text())
        self.machine, self.settings = document["machine"], document["settings"]
        self._rounds = {(m["case"], m["task"], m["contender"]): m["rounds"] for m in document["measurements"]}
        self.contenders = list(dict.fromkeys(contender for _, _, contender in self._rounds))
        self.tasks = list(dict.fromkeys(task for _, task, _ in self._rounds))

    def cases(self, task: str) -> list[str]:
        return list(dict.fromkeys(case for case, t, _ in self._rounds if t == task))

    def rounds(self, case: str, task: str, contender: str) -> list[dict[str, Any]]:
        return self._rounds.get((case, task, contender), [])

    def error(self, case: str, task: str, contender: str) -> str | None:
        errors = [r["error"] for r in self.rounds(case, task, contender) if "error" in r]
        return errors[0] if errors else None

    def values(self, case: str, task: str, contender: str, field: str) -> list[float]:
        """One number per round; of `seconds`, the median of its samples."""
        rounds = self.rounds(case, task, contender)
        if self.error(case, task, contender) or not rounds:
            return []
        return [median(r[field]) if field == "seconds" else float(r[field]) for r in rounds]

    def ratios(self, case: str, task: str, contender: str) -> list[float]:
        """Of times, to native torch's, round by round."""
        ours, native = (self.values(case, task, c, "seconds") for c in (contender, BASELINE))
        return [a / b for a, b in zip(ours, native, strict=False) if b > 0]

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
