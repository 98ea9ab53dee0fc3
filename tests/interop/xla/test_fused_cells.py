"""The fused cells that torch runs on a GPU only: their functions, beside torch's cells on the CPU."""

import numpy as np
import pytest
import torch
from torch import nn
from torchleaf import to_jax
from torchleaf.interop.xla import table


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell])
def test_outputs_are_torchs(cls, bias):
    torch.manual_seed(0)
    cell, x, h, c = cls(3, 4, bias=bias), torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    is_lstm = cls is nn.LSTMCell
    function = table.find(f"_thnn_fused_{'lstm' if is_lstm else 'gru'}_cell.default").function
    biases = (cell.bias_ih, cell.bias_hh) if bias else ()
    given = x @ cell.weight_ih.T, h @ cell.weight_hh.T, c if is_lstm else h, *biases
    *found, kept = function(*to_jax(given))
    expected = cell(x, (h, c)) if is_lstm else (cell(x, h),)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert kept.shape == (2, 16 if is_lstm else 20)
