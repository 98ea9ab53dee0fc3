"""Native torch, as one writes it: `no_grad` for inference, `loss.backward()` for gradients, torch.func for the rest."""

import torch_programs
from cases import Case, Task
from steps import Step


def build(case: Case, task: Task) -> Step:
    return torch_programs.step(case, task)
