"""A data-parallel training step on one and two CPU devices, each with one core and one torch thread.

`python tests/benchmarks/devices.py` prints a table: each line a contender and a case, each number from a process of its
own, the best of several runs. `--package FOLDER` measures another torchleaf (in FOLDER/torchleaf) as well.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS, REPEATS = 8, 3
CASES = ("transformer", "resnet18")
CONTENDERS = ("torchleaf, vmap", "torchleaf, batched", "torchleaf, shard_map", "wrap-torch2jax, shard_map", "pure JAX")


def main() -> None:
    """Measure everything, or (with --worker) one number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", action="append", default=[], help="a folder with another torchleaf in it")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        contender, case, n = options.worker
        print(json.dumps(milliseconds(contender, case, int(n))))
        return
    print("| | 1 device (ms) | 2 devices (ms) | ratio |\n|---|---|---|---|")
    for package in ("", *options.package):
        for case in CASES:
            for contender in CONTENDERS:
                is_peer, is_mapped = not contender.startswith("torchleaf"), contender.endswith(("vmap", "batched"))
                if (is_peer and package) or (is_mapped and case == "resnet18"):  # whose statistics are of the batch
                    continue
                times = [measured(contender, case, n, package) for n in (1, 2)]
                label = f"{case}: {contender}{f' ({Path(package).name})' if package else ''}"
                print(f"| {label} | {times[0]:.1f} | {times[1]:.1f} | {times[0] / times[1]:.2f} |", flush=True)


def measured(contender: str, case: str, n: int, package: str) -> float:
    """The milliseconds of a step, in a process of its own with `n` devices; nan where it does not run."""
    flags = f"--xla_force_host_platform_device_count={n} --xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    if package:
        environment["PYTHONPATH"] = package
    command = [sys.executable, "-W", "ignore", __file__, "--worker", contender, case, str(n)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else float("nan")


def milliseconds(contender: str, case: str, n: int) -> float:
    """The time of one step."""
    import jax
    import jax.numpy as jnp
    import modules
    import torch
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case == "transformer":
        module, x = modules.transformer(4, 256, 8), torch.randn(8, 128, 256)
    else:
        module, x = modules.ResNet18(10).eval(), torch.randn(8, 3, 32, 32)
    params, apply, by_hand = _model(contender, module, x[: len(x) // n])
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def loss(params, x):
        return jnp.mean(apply(params, x) ** 2)

    if by_hand:
        each = loss
        loss = jax.shard_map(
            lambda p, x: jax.lax.pmean(each(p, x), "data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=contender.startswith("torchleaf"),  # the peer's calls do not say along which axes they vary
        )

    @jax.jit
    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads), value

    params, x = jax.device_put(params, everywhere), jax.device_put(jnp.asarray(x.numpy()), split)
    for _ in range(4):
        params, value = step(params, x)
        jax.block_until_ready(value)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            params, value = step(params, x)
        jax.block_until_ready((params, value))
        best = min(best, (time.perf_counter() - start) / STEPS)
    return 1e3 * best


def _model(contender, module, part):
    """Parameters, a function of them and a batch, and whether it is for `shard_map`; `part` is what a device has."""
    import equinox as eqx
    import jax
    import modules
    import torchleaf

    if contender == "pure JAX":
        from contenders.jax_models import _resnet18, _transformer

        params = torchleaf.to_jax(dict(module.named_parameters()), copy=True)
        is_resnet = isinstance(module, modules.ResNet18)
        return params, _resnet18 if is_resnet else jax.vmap(_transformer, (None, 0)), False
    if contender == "wrap-torch2jax, shard_map":
        import torch
        from contenders import torch2jax  # noqa: F401, which builds its C++
        from wrap_torch2jax import torch2jax as wrapped

        params = {name: p.detach() for name, p in module.named_parameters()}
        call = wrapped(lambda params, x: torch.func.functional_call(module, params, (x,)), params, part)
        return torchleaf.to_jax(params, copy=True), call, True
    method = "batched" if contender == "torchleaf, batched" else "auto"
    model = torchleaf.TorchModule(module, vmap_method=method)
    by_hand = contender == "torchleaf, shard_map"

    def apply(params, x):
        bound = eqx.tree_at(lambda m: m.params, model, params)
        return bound(x) if by_hand else jax.vmap(bound)(x)

    return model.params, apply, by_hand


if __name__ == "__main__":
    main()
