"""pykan: Kolmogorov-Arnold networks, whose layers also hold their parameters in lists."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen


def network(**options: Any) -> nn.Module:
    from kan import KAN

    return KAN(grid=3, k=3, seed=0, auto_save=False, save_act=False, **options)


def layer() -> nn.Module:
    from kan.KANLayer import KANLayer

    return KANLayer(in_dim=2, out_dim=3, num=4, k=3)


def points() -> tuple[torch.Tensor]:
    return (2 * torch.rand(5, 2) - 1,)


test_pykan = zoo_test(
    "kan",
    Specimen("KANLayer", layer, points, output=lambda y: y[0]),
    Specimen("KAN", lambda: network(width=[2, 3, 1]), points),
    Specimen("KAN, symbols off", lambda: network(width=[2, 3, 1]).speed(), points),
    Specimen("KAN with multiplications", lambda: network(width=[2, [2, 1], 1]), points),
)
