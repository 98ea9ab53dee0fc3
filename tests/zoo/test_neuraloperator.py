"""neuraloperator: Fourier neural operators, whose weights are complex or factorised."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen


def model(name: str, **options: Any) -> nn.Module:
    from neuralop import models

    return getattr(models, name)(in_channels=2, out_channels=1, hidden_channels=4, n_layers=2, **options)


def spectral(**options: Any) -> nn.Module:
    from neuralop.layers.spectral_convolution import SpectralConv

    return SpectralConv(2, 3, n_modes=(4, 4), **options)


def uno() -> nn.Module:
    return model(
        "UNO",
        uno_out_channels=[4, 4],
        uno_n_modes=[[4, 4], [4, 4]],
        uno_scalings=[[1.0, 1.0], [1.0, 1.0]],
        channel_mlp_skip="linear",
    )


SINGLE = {"smooth": False}  # its Fourier coefficients are in complex64


def line() -> tuple[torch.Tensor]:
    return (torch.randn(2, 2, 16),)


def grid() -> tuple[torch.Tensor]:
    return (torch.randn(2, 2, 8, 8),)


test_neuraloperator = zoo_test(
    "neuralop",
    Specimen("SpectralConv", spectral, grid, **SINGLE),
    Specimen("SpectralConv, Tucker", lambda: spectral(factorization="tucker", rank=0.5), grid, **SINGLE),
    Specimen("FNO, 1 axis", lambda: model("FNO", n_modes=(6,)), line, **SINGLE),
    Specimen("FNO, 2 axes", lambda: model("FNO", n_modes=(4, 4)), grid, **SINGLE),
    Specimen("TFNO", lambda: model("TFNO", n_modes=(4, 4)), grid, **SINGLE),
    Specimen("UNO", uno, grid, **SINGLE),
)
