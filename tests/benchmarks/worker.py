"""One measurement, in this process: `worker.py CASE TASK CONTENDER --seconds 1.5 --output FILE`.

Writes a JSON object with either the measurements or an `error`.
"""

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import contenders
import memory
import steps
from cases import CASES

_SAMPLES, _FEWEST = 50, 3
_WARM = 4  # calls after which nothing is done for the first time any more


def measure(case_name: str, task: str, contender: str, seconds: float) -> dict[str, Any]:
    """Build the step, run it once, warm up, then time it for about `seconds`."""
    case = CASES[case_name]
    build = contenders.load(contender)
    imported = memory.reset_peak()

    began = time.perf_counter()
    step = build(case, task)
    result = step.run()
    first_call = time.perf_counter() - began
    digest = steps.digest(step.named(result))
    del result

    per_call = _warm_up(step, seconds / 3)
    memory.settle()
    at_rest = memory.reset_peak()
    times = _time(step, per_call, seconds)
    peak = memory.peak()
    return {
        "seconds": times,
        "first_call_seconds": first_call,
        "working_bytes": peak - at_rest,
        "total_bytes": peak - imported,
        "digest": digest,
    }


def _warm_up(step: steps.Step, seconds: float) -> float:
    """Run until caches are warm; returns the time of one call."""
    began, calls = time.perf_counter(), 0
    while calls < _WARM or time.perf_counter() - began < seconds:
        step.run()
        calls += 1
    return (time.perf_counter() - began) / calls


def _time(step: steps.Step, per_call: float, seconds: float) -> list[float]:
    """Seconds per call, in samples of as many calls as make about `_SAMPLES` samples."""
    calls = max(1, round(seconds / _SAMPLES / per_call))
    samples = max(_FEWEST, min(_SAMPLES, round(seconds / calls / per_call)))
    times = []
    for _ in range(samples):
        began = time.perf_counter()
        for _ in range(calls):
            step.run()
        times.append((time.perf_counter() - began) / calls)
    return times


def _versions(contender: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in contenders.CONTENDERS[contender].distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("task")
    parser.add_argument("contender", choices=contenders.CONTENDERS)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    try:
        record = measure(options.case, options.task, options.contender, options.seconds)
    except Exception as error:  # the table shows what a contender cannot do
        record = {"error": f"{type(error).__name__}: {error}"}
    record["versions"] = _versions(options.contender)
    options.output.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
