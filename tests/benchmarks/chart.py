"""The chart of one task: each contender's time over native torch's, as bars by case, on a log axis."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cases import CASES
from contenders import BASELINE, CONTENDERS
from formatting import factor
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter
from results import Results

_COLOURS = {
    "torch.compile": "#e69f00",
    "torchleaf": "#0072b2",
    "torchleaf-recompute": "#56b4e9",
    "torchleaf-xla": "#f0e442",
    "wrap-torch2jax": "#d55e00",
    "torch-jax-interop": "#cc79a7",
    "torchax": "#009e73",
    "pure_callback": "#999999",
    "jax": "#000000",
}
_GROUP = 0.84  # of the height between two cases


def draw(results: Results, task: str, path: Path) -> None:
    """Save the chart of `task` as a PNG."""
    contenders = [c for c in CONTENDERS if c in results.contenders and c != BASELINE]
    cases = results.cases(task)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 1.4 + len(cases) * max(0.5, 0.14 * len(contenders))), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        for i, contender in enumerate(contenders):
            height = _GROUP / len(contenders)
            ratios = {
                row + (i + 0.5) * height - _GROUP / 2: _ratio(results, c, task, contender)
                for row, c in enumerate(cases)
            }
            _bars(axes, ratios, height, contender)
        _frame(axes, [CASES[case].title for case in cases])
        rounds, threads = results.settings["rounds"], results.settings["threads"]
        axes.set_title(f"{task} (threads: {threads}; rounds: {rounds})")
        handles = [Patch(color=_COLOURS[c], label=c) for c in contenders]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=150)


def _ratio(results: Results, case: str, task: str, contender: str) -> float | str:
    """The ratio, or a word in its place."""
    ratio = results.ratio(case, task, contender)
    return ratio if ratio is not None else "error" if results.error(case, task, contender) else ""


def _bars(axes: Any, ratios: dict[float, float | str], height: float, contender: str) -> None:
    measured = {y: ratio for y, ratio in ratios.items() if not isinstance(ratio, str)}
    lengths = [ratio - 1 for ratio in measured.values()]
    axes.barh(list(measured), lengths, height=height, left=1, color=_COLOURS[contender])
    for y, ratio in ratios.items():
        text, x = (ratio, 1.0) if isinstance(ratio, str) else (factor(ratio), ratio)
        aside = {"ha": "left", "xytext": (3, 0)} if x >= 1 else {"ha": "right", "xytext": (-3, 0)}
        axes.annotate(text, (x, y), textcoords="offset points", va="center", fontsize=6, color="#333333", **aside)


def _frame(axes: Any, titles: list[str]) -> None:
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(titles)), [textwrap.fill(title, 28) for title in titles])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_xlabel("time per call / native torch (left is faster)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # labels where there is less than a decade
    axes.grid(axis="x", which="major", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
