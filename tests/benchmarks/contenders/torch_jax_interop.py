"""torch-jax-interop (https://github.com/lebrice/torch_jax_interop): `torch_module_to_jax`, with an example output."""

import jax
import jax_programs
import torch
from cases import Case, Task
from steps import Step
from torch_jax_interop import torch_module_to_jax


def build(case: Case, task: Task) -> Step:
    return jax_programs.step(case, task, _wrap, hessian=lambda f: jax.jacrev(jax.jacrev(f)))


def _wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
    names = [name for name, _ in module.named_parameters()]
    apply, _ = torch_module_to_jax(module, example_output=torch.zeros(case.output))
    return lambda params, *inputs: apply(tuple(params[name] for name in names), *inputs)
