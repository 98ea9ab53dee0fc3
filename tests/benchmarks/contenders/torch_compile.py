"""`torch.compile`: of the module, of the cell in a Python loop, or of the torch.func transform."""

import torch
import torch_programs
from cases import Case, Task
from steps import Step


def build(case: Case, task: Task) -> Step:
    return torch_programs.step(case, task, torch.compile)
