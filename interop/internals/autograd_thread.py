"""The thread on which torch goes backward on a GPU, one for each."""

import torch


def meet_autograd(device: torch.device) -> None:
    """A backward pass on a device, the smallest there is.

    The first one lets the thread meet its device: cuBLAS, where it comes first, warns of that. A later one finds the
    thread done with the passes before: it holds what they returned for a moment after they have returned.

    Source: `Engine::thread_main` in torch's
    [engine.cpp](https://github.com/pytorch/pytorch/blob/main/torch/csrc/autograd/engine.cpp).
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device=device, requires_grad=True)
        torch.autograd.grad(x.exp(), x)
