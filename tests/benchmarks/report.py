"""Tables and charts of the results: `report.py DIR` writes them again from DIR/results.json.

A ratio is the median over rounds of the contender's median time over native torch's in the same round.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import chart
from cases import CASES
from contenders import BASELINE
from formatting import duration, factor, short
from results import Results

TABLES = "results.md"

Cell = Callable[[Results, str, str, str], str]
"""Of results, a case, a task and a contender."""


def write(directory: Path) -> None:
    """Write the tables and charts of `directory`, and print the tables."""
    results = Results(directory)
    text = tables(results)
    (directory / TABLES).write_text(text)
    print(text)
    for task in results.tasks:
        chart.draw(results, task, directory / f"{task}.png")


def tables(results: Results) -> str:
    errors: dict[str, int] = {}
    sections = [_heading(results)]
    for task in results.tasks:
        sections += [
            f"## {task}: time per call (ratio to native torch)\n\n{table(results, task, _time, errors)}",
            f"## {task}: working memory of a call, MiB\n\n{table(results, task, memory, errors)}",
            f"## {task}: build, trace, compile and first call\n\n{table(results, task, first, errors)}",
        ]
    notes = [f"{number}. {error}" for error, number in errors.items()]
    return "\n\n".join([*sections, *(["## Errors", "\n".join(notes)] if notes else [])]) + "\n"


def _heading(results: Results) -> str:
    machine, settings = results.machine, results.settings
    versions = "\n".join(
        f"- {contender}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for contender, found in results.versions().items()
    )
    return (
        f"# Benchmark\n\n{machine['processor']}, {machine['cpus']} CPUs, {machine['system']}; threads: "
        f"{settings['threads']}; {settings['rounds']} rounds of {settings['seconds']} s.\n\n{versions}"
    )


def table(results: Results, task: str, cell: Cell, errors: dict[str, int]) -> str:
    """What a cell says of each case and contender; errors are numbered."""

    def text(case: str, contender: str) -> str:
        error = results.error(case, task, contender)
        if error is not None:
            return f"error [{errors.setdefault(short(error), len(errors) + 1)}]"
        return cell(results, case, task, contender) if results.rounds(case, task, contender) else ""

    rows = [["case", *results.contenders]]
    rows += [[CASES[case].title, *(text(case, c) for c in results.contenders)] for case in results.cases(task)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _time(results: Results, case: str, task: str, contender: str) -> str:
    text = duration(median(results.values(case, task, contender, "seconds")))
    ratio = results.ratio(case, task, contender)
    return text if contender == BASELINE or ratio is None else f"{text} ({factor(ratio)})"


def memory(results: Results, case: str, task: str, contender: str) -> str:
    """The working memory of a call, in MiB."""
    return f"{median(results.values(case, task, contender, 'working_bytes')) / 2**20:.1f}"


def first(results: Results, case: str, task: str, contender: str) -> str:
    """The time until the first result."""
    return duration(results.values(case, task, contender, "first_call_seconds")[0])  # later rounds find caches warm


if __name__ == "__main__":
    write(Path(sys.argv[1]))
