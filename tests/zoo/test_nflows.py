"""nflows: log densities of normalizing flows."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

FEATURES = 3


class LogDensity(nn.Module):
    """`flow.log_prob(x)` of a flow of transforms over a normal distribution."""

    def __init__(self, *transforms: Any):
        super().__init__()
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow
        from nflows.transforms.base import CompositeTransform

        self.flow = Flow(CompositeTransform(transforms), StandardNormal([FEATURES]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flow.log_prob(x)


def autoregressive() -> nn.Module:
    from nflows import transforms as T

    steps = [(T.ReversePermutation(FEATURES), T.MaskedAffineAutoregressiveTransform(FEATURES, 8)) for _ in range(2)]
    return LogDensity(*(transform for step in steps for transform in step))


def network(features_in: int, features_out: int) -> nn.Module:
    from nflows.nn.nets import ResidualNet

    return ResidualNet(features_in, features_out, hidden_features=8, num_blocks=1)


def coupling() -> nn.Module:
    from nflows import transforms as T

    masks = [torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])]
    return LogDensity(*(T.AffineCouplingTransform(mask, network) for mask in masks))


def spline_coupling() -> nn.Module:
    from nflows import transforms as T

    return LogDensity(
        T.PiecewiseRationalQuadraticCouplingTransform(
            torch.tensor([0, 1, 0]), network, num_bins=4, tails="linear", tail_bound=3.0
        )
    )


def spline_autoregressive() -> nn.Module:
    from nflows import transforms as T

    return LogDensity(
        T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            FEATURES, 8, num_bins=4, tails="linear", tail_bound=3.0, num_blocks=1
        )
    )


def linear() -> nn.Module:
    from nflows import transforms as T

    return LogDensity(T.LULinear(FEATURES), T.RandomPermutation(FEATURES), T.NaiveLinear(FEATURES))


def batch_norm() -> nn.Module:
    from nflows import transforms as T

    return LogDensity(T.BatchNorm(FEATURES), T.MaskedAffineAutoregressiveTransform(FEATURES, 8))


def points() -> tuple[torch.Tensor]:
    return (torch.randn(5, FEATURES),)


test_nflows = zoo_test(
    "nflows",
    Specimen("masked autoregressive", autoregressive, points),
    Specimen("affine coupling", coupling, points),
    Specimen("spline coupling", spline_coupling, points),
    Specimen("spline autoregressive", spline_autoregressive, points),
    Specimen("linear", linear, points),
    Specimen("BatchNorm", batch_norm, points, training=True),
)
