"""A pytest plugin: torch makes tensors on the GPU, as JAX does, so that tests of the CPU run there."""

import torch

if torch.cuda.is_available():
    torch.set_default_device("cuda")
