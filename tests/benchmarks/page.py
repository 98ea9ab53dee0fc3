"""The results in docs/benchmark.md, between two comments, and its charts: `page.py DIR...` writes them from runs."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import chart
import report
from cases import CASES
from contenders import BASELINE
from formatting import duration, factor
from results import Results

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmark.md"
CHARTS = DOCS / "benchmark"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
OURS = ("torchleaf", "torchleaf-xla")
SLOWER = 1.05
"""What is called slower: ratios nearer to one are not told apart by a few rounds."""


def write(*directories: Path) -> None:
    """Put the results in `directories` into the page."""
    results = Results(*directories)
    CHARTS.mkdir(exist_ok=True)
    for task in results.tasks:
        chart.draw(results, task, CHARTS / f"{task}.png")
    text = PAGE.read_text()
    found = re.search(f"{BEGIN}.*{END}", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{PAGE.name} has no {BEGIN} ... {END}.")
    PAGE.write_text(text[: found.start()] + "\n\n".join([BEGIN, *_sections(results), END]) + text[found.end() :])


def _sections(results: Results) -> Iterator[str]:
    yield _settings(results)
    errors: dict[str, int] = {}
    for task in results.tasks:
        yield f"### {TITLES[task]}"
        yield f"![{TITLES[task]}: time over native torch's, by case and contender](benchmark/{task}.png)"
        yield "Time of a step over native torch's, median of the rounds (lowest to highest):"
        yield report.table(results, task, _ratio, errors)
        yield from _losses(results, task)
    for title, what in FURTHER.items():
        for task in results.tasks:
            yield f"### {TITLES[task]}: {title}"
            yield report.table(results, task, what, errors)
    if errors:
        yield "### What does not run"
        yield "\n".join(f"{number}. {error}" for error, number in errors.items())


TITLES = {"inference": "Inference", "value_and_grad": "Value and gradients"}
FURTHER = {"working memory of a call, MiB": report.memory, "build, trace, compile and first call": report.first}


def _settings(results: Results) -> str:
    machine, settings = results.machine, results.settings
    versions: dict[str, str] = {}
    for found in results.versions().values():
        versions.update(found)
    ran_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['processor']}, {machine['cpus']} cores; threads: {settings['threads']}; {settings['rounds']} rounds "
        f"of {settings['seconds']} s, each contender in a process of its own.\n{ran_with}."
    )


def _ratio(results: Results, case: str, task: str, contender: str) -> str:
    ratios = results.ratios(case, task, contender)
    if contender == BASELINE:
        return duration(median(results.values(case, task, contender, "seconds")))
    return f"{factor(median(ratios))} ({factor(min(ratios))}-{factor(max(ratios))})"


def _losses(results: Results, task: str) -> Iterator[str]:
    """Where torchleaf loses, for each of its engines."""
    for ours in (c for c in OURS if c in results.contenders):
        to_native, to_others = [], []
        for case in results.cases(task):
            own = results.ratio(case, task, ours)
            if own is None:
                continue
            if own > SLOWER:
                to_native.append(f"{CASES[case].title} ({factor(own)})")
            others = {c: results.ratio(case, task, c) for c in results.contenders if c not in (BASELINE, ours)}
            ahead = {c: own / r for c, r in others.items() if r is not None and own / r > SLOWER}
            if ahead:
                names = ", ".join(f"{c} {factor(r)}" for c, r in sorted(ahead.items(), key=lambda item: -item[1]))
                to_others.append(f"{CASES[case].title} ({names})")
        yield (
            f"**What {ours} loses.** Slower than native torch: {', '.join(to_native) or 'nowhere'}. Slower than "
            f"another contender, by which factor: {'; '.join(to_others) or 'nowhere'}."
        )


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
