"""A function of JAX in a torch program: a forward and backward pass, and a forward pass alone, beside its peers.

`python tests/benchmarks/jax_in_torch.py` prints a table: each line a case, each number the median over rounds of a
process of its own; behind it the ratio to the same step in JAX alone, jitted, of the same round. What a contender
cannot do is printed below. Peers: torch-jax-interop, torchax and jax2torch, where they are installed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from formatting import duration, factor, short

CASES = ("linear", "mlp", "lstm", "transformer")
TASKS = ("value_and_grad", "inference")
BASELINE = "jax"
CONTENDERS = (BASELINE, "torchleaf", "torch", "torch-jax-interop", "torchax", "jax2torch")
TITLES = {BASELINE: "JAX alone, jitted", "torchleaf": "`torchleaf.jax_function`", "torch": "the same model in torch"}
_SECONDS = 0.6


def main() -> None:
    """Measure everything, or (with --worker) one number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)), flush=True)
        os._exit(0)  # one process in a hundred aborts while its libraries are unloaded, JAX's alone, too
    errors = []
    names = [name for name in CONTENDERS if name in {BASELINE, *options.contenders}]
    print(f"| | {' | '.join(TITLES.get(name, name) for name in names)} |\n|---|{'---|' * len(names)}")
    for task in TASKS:
        for case in options.cases:
            times: dict[str, list[float]] = {name: [] for name in names}
            for round_ in range(options.rounds):
                for name in [*times][:: (-1) ** round_]:
                    found = worker(name, case, task)
                    if isinstance(found, float):
                        times[name].append(found)
                    else:
                        errors.append(f"{name}, {case}, {task}: {found}")
                        del times[name]
            cells = [cell(times[name], times[BASELINE]) if name in times else "cannot" for name in names]
            print(f"| {case}, {task} | {' | '.join(cells)} |", flush=True)
    print(*map("- {}".format, errors), sep="\n")


def cell(times: list[float], base: list[float]) -> str:
    """The median, and its ratio to the baseline: the median of the rounds' and their range."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    spread = f" ({factor(min(ratios))} to {factor(max(ratios))})"
    return duration(median(times)) + ("" if times is base else f", {factor(median(ratios))}{spread}")


def worker(contender: str, case: str, task: str) -> float | str:
    """Seconds of a step, measured in a process of its own, or the error."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", contender, case, task]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else short(found.stderr)


def measure(contender: str, name: str, task: str) -> float:
    """The median of samples, each the mean of some steps."""
    import steps
    from cases import CASES

    case = CASES[name]
    run, named = _BUILDERS[contender](case, task)
    if contender != "torch":
        import torch_programs

        reference = torch_programs.step(case, task)  # what is right
        found, expected = (steps.digest(x) for x in (named(run()), reference.named(reference.run())))
        problem = steps.difference(found, expected)
        if problem:
            raise RuntimeError(f"WrongError: {problem}")
    for _ in range(5):
        began = time.perf_counter()
        run()
        once = time.perf_counter() - began
    calls, samples = max(1, int(0.02 / once)), []
    deadline = time.perf_counter() + _SECONDS
    while time.perf_counter() < deadline or len(samples) < 5:
        began = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - began) / calls)
    return median(samples)


Built = tuple[Callable[[], Any], Callable[[Any], Any]]


def _native(case: Any, task: Any) -> Built:
    import torch_programs

    step = torch_programs.step(case, task)
    return step.run, step.named


def _jax(case: Any, task: Any) -> Built:
    from contenders import jax_models

    step = jax_models.build(case, task)
    return step.run, step.named


def _in_torch(wrap: Callable[..., Any]) -> Callable[[Any, Any], Built]:
    """A step of torch's around `wrap(apply, params)`: a function of tensors, and the parameters that it takes."""

    def build(case: Any, task: Any) -> Built:
        import place
        import torch
        from contenders import jax_models

        inputs, target = case.data()
        tensors, target = (
            tuple(place.tensor(x).clone() for x in inputs),
            place.tensor(target),
        )  # memory as torch aligns it
        params = {n: p.detach().clone().requires_grad_() for n, p in case.module().named_parameters()}
        call, params = wrap(jax_models._MODELS[case.name], params)

        def inference() -> Any:
            with torch.no_grad():
                return {"output": call(*tensors)}

        def value_and_grad() -> Any:
            loss = torch.nn.functional.mse_loss(call(*tensors), target)
            loss.backward()
            result = {"loss": loss.detach(), **{f"grad {name}": p.grad for name, p in params.items()}}
            for p in params.values():
                p.grad = None
            return result

        def named(result: Any) -> Any:
            return {name: x.detach().numpy() for name, x in result.items()}

        return (inference if task == "inference" else value_and_grad), named

    return build


def _torchleaf(apply: Any, params: Any) -> Any:
    import torchleaf

    return functools.partial(torchleaf.jax_function(apply), params), params


def _interop(apply: Any, params: Any) -> Any:
    import jax
    import torchleaf
    from torch_jax_interop import WrappedJaxFunction

    module = WrappedJaxFunction(jax.jit(apply), torchleaf.to_jax(params, copy=True))
    return module, dict(zip(sorted(params), module.params, strict=True))


def _jax2torch(apply: Any, params: Any) -> Any:
    import jax
    from jax2torch import jax2torch

    names = list(params)
    arguments = ", ".join(f"x{i}" for i in range(len(names) + 1))  # it reads the signature, and takes no *args
    source = f"lambda {arguments}: apply(dict(zip(names, [{arguments}])), x{len(names)})"
    call = jax2torch(jax.jit(eval(source, {"apply": apply, "names": names})))
    return lambda x: call(*params.values(), x), params


def _torchax(case: Any, task: Any) -> Built:
    """torchax's tensors are JAX's arrays: they are made once, as its users make them."""
    import contenders.torchax  # noqa: F401, which lets torchax be imported
    import jax
    import place
    import torch
    import torchax
    from contenders import jax_models
    from torchax.interop import j2t_autograd, jax_view, torch_view

    def call_jax(function: Any, *args: Any) -> Any:
        """Its own takes functions among the arguments for torch's, and has JAX's called with its tensors."""
        return torch_view(function(*jax.tree.map(lambda x: jax_view(x) if isinstance(x, torch.Tensor) else x, args)))

    environment = torchax.default_env()
    inputs, target = case.data()
    model = jax_models._MODELS[case.name]
    call = j2t_autograd(jax.jit(lambda params, x: model(params, x)), call_jax)  # it would pass defaults, too
    with environment:
        tensors, target = [place.tensor(x).to("jax") for x in inputs], place.tensor(target).to("jax")
        weights = {n: p.detach().to("jax").requires_grad_() for n, p in case.module().named_parameters()}

    def inference() -> Any:
        with environment, torch.no_grad():
            return jax.block_until_ready(jax_view({"output": call(weights, *tensors)}))

    def value_and_grad() -> Any:
        with environment:
            loss = torch.nn.functional.mse_loss(call(weights, *tensors), target)
            loss.backward()
            result = {"loss": loss.detach(), **{f"grad {name}": p.grad for name, p in weights.items()}}
            for p in weights.values():
                p.grad = None
            return jax.block_until_ready(jax_view(result))

    return (inference if task == "inference" else value_and_grad), lambda result: {
        name: place.numbers(x) for name, x in result.items()
    }


_BUILDERS: dict[str, Callable[[Any, Any], Built]] = {
    BASELINE: _jax,
    "torchleaf": _in_torch(_torchleaf),
    "torch": _native,
    "torch-jax-interop": _in_torch(_interop),
    "torchax": _torchax,
    "jax2torch": _in_torch(_jax2torch),
}


if __name__ == "__main__":
    main()
