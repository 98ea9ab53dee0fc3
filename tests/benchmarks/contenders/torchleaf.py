"""torchleaf, under `jax.jit`."""

import equinox as eqx
import jax
import jax_programs
import place
import torch
import torchleaf
from cases import Case, Task
from steps import Step


def build(case: Case, task: Task, residuals: str) -> Step:
    def wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
        model = torchleaf.TorchModule(place.module(module), residuals=residuals)

        def apply(params: jax_programs.Params, *inputs: jax.Array) -> jax.Array:
            return eqx.tree_at(lambda m: m.params, model, params)(*inputs)

        return apply

    return jax_programs.step(case, task, wrap)
