"""Which device torch's tensors are on while a call is traced."""

from types import SimpleNamespace

import torch
from torchleaf.interop.values import device

GPU = SimpleNamespace(platform="gpu", local_hardware_id=1)


def test_gpus_are_both_frameworks_or_none(monkeypatch):
    """A torch without CUDA computes on the host, also beside a JAX that is on a GPU."""
    for has_cuda, expected in ((True, torch.device("cuda", 1)), (False, torch.device("cpu"))):
        monkeypatch.setattr(device, "_has_cuda", lambda has_cuda=has_cuda: has_cuda)
        assert device.torch_device(GPU) == expected
    assert device.torch_device(SimpleNamespace(platform="cpu")) == torch.device("cpu")
