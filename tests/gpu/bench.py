"""Time contenders on a GPU: `bench.py [--contenders torch torchleaf ...] [--cases ...] [--output FILE]`.

All of them in one process, their samples in turn, so that ratios do not depend on clocks and temperature. A sample is a
step dispatched several times in a row and waited for once, as a training loop does: what the host does counts only
where the device waits for it. With `--memory`, one contender, and the peaks of both allocators instead.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import contenders
import jax
import modules
import place
import steps
import torch
from cases import CASES, Case, Shape

LARGE = {
    case.name: case
    for case in (
        Case(
            "transformer_large",
            "Transformer encoder 12 x 768, 16 x 256 tokens",
            "module",
            lambda: modules.transformer(layers=12, width=768, heads=12),
            (Shape((16, 256, 768)),),
            (16, 256, 768),
        ),
        Case(
            "resnet18_large",
            "ResNet-18, 64 x 3 x 64 x 64",
            "module",
            lambda: modules.ResNet18(classes=10),
            (Shape((64, 3, 64, 64)),),
            (64, 10),
        ),
        Case(
            "resnet50",
            "ResNet-50, 64 x 3 x 64 x 64",
            "module",
            lambda: modules.ResNet50(classes=10),
            (Shape((64, 3, 64, 64)),),
            (64, 10),
        ),
        Case(
            "bert_base",
            "BERT-base (transformers), 16 x 128 tokens",
            "module",
            lambda: modules.Bert(layers=12, width=768, heads=12, vocabulary=30522),
            (Shape((16, 128), tokens=30522),),
            (16, 128, 768),
        ),
    )
}
EVERY = CASES | LARGE
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WARM, _FEWEST, _SAMPLES, _IN_A_ROW = 6, 5, 50, 5
Record = dict[str, Any]


def compare(case: Case, task: str, builds: dict[str, Any], seconds: float) -> dict[str, Record]:
    """Each contender's times for one step: the median of its samples, the lowest and the highest."""
    records, steps_of = {}, {}
    for name, build in builds.items():
        try:
            began = time.perf_counter()
            step = build(case, task)
            digest = steps.digest(step.named(step.run()))
            records[name] = {"first": time.perf_counter() - began, "digest": digest}
            for _ in range(_WARM):  # recordings, proofs, captures
                step.run()
            steps_of[name] = step
        except Exception as exc:  # the table shows what a contender cannot do
            records[name] = {"error": f"{type(exc).__name__}: {exc}".splitlines()[0][:200]}
    calls = {name: 1 if _sample(step, 1) > 0.05 else _IN_A_ROW for name, step in steps_of.items()}
    total = sum(_sample(step, calls[name]) * calls[name] for name, step in steps_of.items())
    times: dict[str, list[float]] = {name: [] for name in steps_of}
    for _ in range(max(_FEWEST, min(_SAMPLES, int(seconds * len(steps_of) / total))) if steps_of else 0):
        for name, step in steps_of.items():
            times[name].append(_sample(step, calls[name]))
    for name, found in times.items():
        records[name] |= {"seconds": median(found), "low": min(found), "high": max(found), "samples": len(found)}
    return records


def _sample(step: steps.Step, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        result = step.start()
    step.wait(result)
    return (time.perf_counter() - began) / calls


def peaks(case: Case, task: str, build: Any) -> Record:
    """Bytes that both allocators had in use at most: in the first steps, which are recorded and compared, and in later
    ones. JAX's peak cannot be reset, so that a case has to come alone."""
    step, record = build(case, task), {}
    for phase in ("first", "later"):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(_WARM):
            step.run()
        in_jax = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        record[f"{phase}_bytes"] = torch.cuda.max_memory_allocated() + in_jax
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=contenders.CONTENDERS, default=["torch", "torchleaf", "jax"])
    parser.add_argument("--cases", nargs="+", choices=EVERY, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tasks", nargs="+", default=["value_and_grad", "inference"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each entry")
    parser.add_argument("--memory", action="store_true", help="peaks of memory instead of times")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")  # torch's own choice: float32 is not TF32
    builds = {name: contenders.load(name) for name in options.contenders}
    records: list[Record] = []
    for precision in options.precisions:
        place.choose("cuda" if torch.cuda.is_available() else "cpu", PRECISIONS[precision])
        for name in options.cases:
            for task in (t for t in EVERY[name].tasks if t in options.tasks):
                key = {"precision": precision, "case": name, "task": task}
                if options.memory:
                    build = builds[options.contenders[0]]
                    found = {options.contenders[0]: peaks(EVERY[name], task, build)}
                else:
                    found = compare(EVERY[name], task, builds, options.seconds)
                records += [{**key, "contender": contender, **record} for contender, record in found.items()]
                print(" ".join(key.values()), *map(_shown, found.items()), sep="  ", flush=True)
                if options.output:
                    options.output.write_text(json.dumps(records))
            gc.collect()
            jax.clear_caches()


def _shown(item: tuple[str, Record]) -> str:
    name, record = item
    if "seconds" in record:
        return f"{name} {record['seconds'] * 1e3:.3f} ms"
    if "later_bytes" in record:
        return f"{name} {record['first_bytes'] / 2**20:.0f}, then {record['later_bytes'] / 2**20:.0f} MiB"
    return f"{name} {record['error'][:80]}"


if __name__ == "__main__":
    main()
