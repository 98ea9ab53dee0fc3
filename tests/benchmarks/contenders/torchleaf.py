"""torchleaf, under `jax.jit`, with parameters that are views of the module's."""

import equinox as eqx
import jax
import jax_programs
import place
import torchleaf
from cases import Case, Task
from steps import Step


def build(case: Case, task: Task, **options: str) -> Step:
    model = torchleaf.TorchModule(place.module(case.module()), **options)

    def apply(params: jax_programs.Params, *inputs: jax.Array) -> jax.Array:
        return eqx.tree_at(lambda m: m.params, model, params)(*inputs)

    own = None if case.kind == "ensemble" else dict(model.params)
    return jax_programs.step(case, task, lambda case, module: apply, params=own)
