"""wrap-torch2jax (https://github.com/rdyro/torch2jax), as its README shows for modules.

It defines reverse mode up to second order, so the Hessian is taken in reverse over reverse.
"""

import jax
import jax_programs
import place
import torch
from cases import Case, Task
from steps import Step
from wrap_torch2jax import compile_and_import_module, torch2jax

compile_and_import_module()  # C++, built at the first use on a machine: counted as installation


def build(case: Case, task: Task) -> Step:
    return jax_programs.step(case, task, _wrap, hessian=lambda f: jax.jacrev(jax.jacrev(f)))


def _wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
    module = place.module(module)

    def call(params: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, params, inputs)

    params = {name: p.detach() for name, p in module.named_parameters()}
    example = [place.tensor(x) for x in case.call_inputs()]
    positions = range(len(example))
    constant = [1 + i for i in positions if i not in case.active_inputs]
    return torch2jax(call, params, *example, nondiff_argnums=constant)
