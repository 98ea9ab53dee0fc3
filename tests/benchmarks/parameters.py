"""What a parameter costs per call: `python tests/benchmarks/parameters.py`.

Modules of 10, 100 and 1,000 parameters that compute nothing to speak of, called in one process, in alternating rounds:
torch's own call, `torch.func.functional_call`, and a torchleaf `TorchModule` under `jax.jit`; microseconds, medians.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
import torchleaf
from torch import nn

_COUNTS, _ROUNDS, _CALLS = (10, 100, 1000), 15, 200


class Many(nn.Module):
    """Adds the first of its many parameters."""

    def __init__(self, count: int):
        super().__init__()
        self.first, *rest = (nn.Parameter(torch.zeros(4)) for _ in range(count))
        self.rest = nn.ParameterList(rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.first


def contenders(count: int) -> dict[str, Callable[[], Any]]:
    """Calls of one module, by what makes them."""
    module = Many(count).eval()
    weights = dict(module.named_parameters())
    model, x, xs = torchleaf.TorchModule(module), torch.ones(4), jnp.ones(4)
    leaves, structure = jax.tree.flatten(eqx.filter(model, eqx.is_array))
    static = eqx.filter(model, eqx.is_array, inverse=True)
    call = jax.jit(lambda leaves, x: eqx.combine(jax.tree.unflatten(structure, leaves), static)(x))
    return {
        "torch": lambda: module(x),
        "functional_call": lambda: torch.func.functional_call(module, weights, (x,)),
        "torchleaf": lambda: call(leaves, xs).block_until_ready(),
        "jax alone": lambda: alone(leaves, xs).block_until_ready(),
    }


@jax.jit
def alone(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
    """The same in JAX, which hands every leaf to XLA as well."""
    return x + leaves[0] + 0.0 * sum(leaf[0] for leaf in leaves[-1:])


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - began) / _CALLS


def main() -> None:
    torch.set_num_threads(1)
    table: dict[str, list[float]] = {}
    for count in _COUNTS:
        calls = contenders(count)
        times: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for _ in range(_ROUNDS + 1):
                for name, call in calls.items():
                    times[name].append(_seconds(call))
        for name, values in times.items():
            table.setdefault(name, []).append(median(values[1:]) * 1e6)
    print("| parameters | " + " | ".join(map(str, _COUNTS)) + " | each |\n|---|" + "---|" * (len(_COUNTS) + 1))
    for name, values in table.items():
        each = (values[-1] - values[0]) / (_COUNTS[-1] - _COUNTS[0])
        print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {each:.2f} |")


if __name__ == "__main__":
    main()
