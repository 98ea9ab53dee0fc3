"""Compare torchleaf with native torch and its peers: `python tests/benchmarks/run.py --output DIR`.

Every (case, task, contender) is measured in a process of its own. A round runs all of them, grouped by case and task,
so that what is compared lies close in time; the next round runs the contenders in the reverse order.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import page
import report
import results
import steps
from cases import CASES
from contenders import BASELINE, CONTENDERS
from formatting import duration, short

_WORKER = Path(__file__).with_name("worker.py")
Job = tuple[str, str, str]


def main() -> None:
    options = _parse()
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(options)
    runs: dict[Job, list[dict[str, Any]]] = {job: [] for job in itertools.chain(*jobs)}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchleaf-benchmark-") as scratch:
        for number in range(options.rounds):
            for group in jobs:
                for job in group[:: -1 if number % 2 else 1]:
                    if any("error" in record for record in runs[job]):
                        continue
                    record = _measure(job, options, Path(scratch))
                    runs[job].append(record)
                    _progress(number, options.rounds, time.monotonic() - began, job, record)
                _save(options, runs, rounds=number + 1)
    report.write(options.output)
    if options.page:
        page.write(options.output)


def _jobs(options: argparse.Namespace) -> list[list[Job]]:
    """Jobs in groups that are compared with each other; the baseline leads."""
    contenders = [BASELINE, *(c for c in options.contenders if c != BASELINE)]
    return [
        [(case, task, contender) for contender in contenders]
        for case in options.cases
        for task in CASES[case].tasks
        if task in options.tasks
    ]


def _measure(job: Job, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run one worker process."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    python = options.python.get(job[2], sys.executable)
    command = [python, str(_WORKER), *job, "--seconds", str(options.seconds), "--output", str(result)]
    with (scratch / "log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(options, scratch, job), start_new_session=True
        )
        try:
            code = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"timeout: no result after {options.timeout:g} s"}
        finally:
            _end(process)
        if result.exists():
            return json.loads(result.read_text())
        log.seek(0)
        last = (log.read().decode(errors="replace").strip().splitlines() or [""])[-1]
    return {"error": f"process ended with status {code}: {last}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and what it has started (compilers)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _environment(options: argparse.Namespace, scratch: Path, job: Job) -> dict[str, str]:
    """Compilation caches are empty in the first round, whose first calls are reported."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor" / "-".join(job))
    environment["JAX_PLATFORMS"] = "cpu"
    if options.threads != "default":
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "PJRT_NPROC"):
            environment[name] = options.threads
        if options.threads == "1":
            flags = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
            environment["XLA_FLAGS"] = flags.strip()
    return environment


def _progress(number: int, rounds: int, elapsed: float, job: Job, record: dict[str, Any]) -> None:
    outcome = short(record["error"]) if "error" in record else duration(median(record["seconds"]))
    print(f"[round {number + 1}/{rounds}, {elapsed / 60:5.1f} min] {' '.join(job)}: {outcome}", flush=True)


def _save(options: argparse.Namespace, runs: dict[Job, list[dict[str, Any]]], rounds: int) -> None:
    """Write the results so far; a result that differs from the baseline's becomes an error."""
    measurements = []
    for (case, task, contender), records in runs.items():
        expected = next((r["digest"] for r in runs[case, task, BASELINE] if "digest" in r), None)
        checked = [_check(record, expected) for record in records]
        measurements.append({"case": case, "task": task, "contender": contender, "rounds": checked})
    document = {
        "machine": _machine(),
        "settings": {"threads": options.threads, "rounds": rounds, "seconds": options.seconds},
        "measurements": measurements,
    }
    (options.output / results.FILE).write_text(json.dumps(document, indent=1))


def _check(record: dict[str, Any], expected: steps.Digest | None) -> dict[str, Any]:
    if "error" in record or expected is None:
        return record
    wrong = steps.difference(record["digest"], expected)
    return record if wrong is None else {**record, "error": f"wrong result: {wrong}"}


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"system": platform.platform(), "processor": model, "cpus": os.cpu_count()}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    tasks = ["inference", "value_and_grad"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a worker times its step")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a worker counts as failed")
    parser.add_argument("--threads", default="default", help="'default', or threads for torch and XLA each")
    parser.add_argument("--python", nargs="+", default=[], metavar="CONTENDER=PATH", help="run it by this interpreter")
    parser.add_argument("--output", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--page", action="store_true", help="put the results into docs/benchmark.md, with charts")
    parser.epilog = f"cases: {', '.join(CASES)}\ncontenders: {', '.join(CONTENDERS)}\ntasks: {', '.join(tasks)}"
    options = parser.parse_args()
    options.python = dict(item.split("=", 1) for item in options.python)
    unknown = options.python.keys() - CONTENDERS.keys()
    if unknown:
        parser.error(f"--python: no such contender: {', '.join(sorted(unknown))}")
    if options.threads != "default" and not options.threads.isdigit():
        parser.error("--threads: 'default' or a number")
    for name, path in options.python.items():
        if shutil.which(path) is None:
            parser.error(f"--python {name}: no interpreter at {path}")
    return options


if __name__ == "__main__":
    main()
