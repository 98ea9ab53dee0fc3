"""e3nn: equivariant layers, whose code is generated and scripted when they are built."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

torch.serialization.add_safe_globals([slice])  # e3nn 0.4 loads constants that hold slices when it is imported

SCALARS_AND_VECTORS = "4x0e+2x1o"
SIZE = 10  # 4 + 2 * 3


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3)


def edges(nodes: int, count: int) -> torch.Tensor:
    """Senders and receivers, no node its own neighbour."""
    senders = torch.arange(count) % nodes
    return torch.stack([senders, (senders + 1 + torch.arange(count) // nodes) % nodes])


class Convolution(nn.Module):
    """The convolution of e3nn's guide: a tensor product with the spherical harmonics, weighted by the distance."""

    def __init__(self, irreps_in: Any, irreps_out: Any):
        super().__init__()
        from e3nn import o3
        from e3nn.nn import FullyConnectedNet

        self.irreps_sh = o3.Irreps.spherical_harmonics(2)
        self.product = o3.FullyConnectedTensorProduct(
            irreps_in, self.irreps_sh, irreps_out, shared_weights=False, internal_weights=False
        )
        self.radial = FullyConnectedNet([5, 8, self.product.weight_numel], torch.nn.functional.silu)

    def forward(self, features: torch.Tensor, positions: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        from e3nn import o3
        from e3nn.math import soft_one_hot_linspace

        senders, receivers = edges
        along = positions[receivers] - positions[senders]
        harmonics = o3.spherical_harmonics(self.irreps_sh, along, normalize=True, normalization="component")
        distances = soft_one_hot_linspace(along.norm(dim=1), 0.0, 3.0, 5, basis="smooth_finite", cutoff=True)
        messages = self.product(features[senders], harmonics, self.radial(distances * 5**0.5))
        return features.new_zeros(len(features), messages.shape[1]).index_add(0, receivers, messages)


class Network(nn.Module):
    """Two convolutions with a gate between them, and a sum over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        from e3nn.nn import Gate

        silu, sigmoid = torch.nn.functional.silu, torch.sigmoid
        self.gate = Gate("4x0e", [silu], "2x0e", [sigmoid], "2x1o")
        self.first = Convolution("2x0e", self.gate.irreps_in)
        self.second = Convolution(self.gate.irreps_out, "1x0e")

    def forward(self, features: torch.Tensor, positions: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return self.second(self.gate(self.first(features, positions, edges)), positions, edges).sum(0)


def linear() -> nn.Module:
    from e3nn import o3

    return o3.Linear(SCALARS_AND_VECTORS, "3x0e+3x1o")


def tensor_product() -> nn.Module:
    from e3nn import o3

    return o3.FullyConnectedTensorProduct(SCALARS_AND_VECTORS, "1x0e+1x1o", SCALARS_AND_VECTORS)


def spherical_harmonics() -> nn.Module:
    from e3nn import o3

    return o3.SphericalHarmonics("0e+1o+2e+3o", normalize=True, normalization="component")


def gate() -> nn.Module:
    from e3nn.nn import Gate

    return Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")


def norm_activation() -> nn.Module:
    from e3nn import o3
    from e3nn.nn import NormActivation

    return NormActivation(o3.Irreps(SCALARS_AND_VECTORS), torch.sigmoid, bias=True)


def batch_norm() -> nn.Module:
    from e3nn.nn import BatchNorm

    return BatchNorm(SCALARS_AND_VECTORS)


def dropout() -> nn.Module:
    from e3nn import o3
    from e3nn.nn import Dropout

    return nn.Sequential(o3.Linear(SCALARS_AND_VECTORS, SCALARS_AND_VECTORS), Dropout(SCALARS_AND_VECTORS, 0.3))


def sphere_activation() -> nn.Module:
    from e3nn.nn import S2Activation

    return S2Activation("0e+1o+2e", torch.tanh, 10)


test_e3nn = zoo_test(
    "e3nn",
    Specimen("Linear", linear, lambda: (torch.randn(5, SIZE),)),
    Specimen("FullyConnectedTensorProduct", tensor_product, lambda: (torch.randn(5, SIZE), torch.randn(5, 4))),
    Specimen("SphericalHarmonics", spherical_harmonics, lambda: (vectors(5),)),
    Specimen("Gate", gate, lambda: (torch.randn(5, 12),)),
    Specimen("NormActivation", norm_activation, lambda: (torch.randn(5, SIZE),)),
    Specimen("BatchNorm", batch_norm, lambda: (torch.randn(5, SIZE),), training=True),
    Specimen("Dropout", dropout, lambda: (torch.randn(5, SIZE),), random=True),
    Specimen("S2Activation", sphere_activation, lambda: (torch.randn(5, 9),)),
    Specimen(
        "Convolution",
        lambda: Convolution(SCALARS_AND_VECTORS, "2x0e+2x1o"),
        lambda: (torch.randn(4, SIZE), vectors(4), edges(4, 8)),
    ),
    Specimen("message passing", Network, lambda: (torch.randn(4, 2), vectors(4), edges(4, 8))),
)
