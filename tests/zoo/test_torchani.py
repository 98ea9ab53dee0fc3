"""TorchANI: atomic environment vectors, energies, and forces by autograd inside the model."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

ELEMENTS = ("H", "C", "N", "O")
METHANE = torch.tensor(
    [[0.03, 0.006, 0.01], [-0.83, 0.39, -0.26], [-0.66, -0.84, 0.21], [0.46, 0.54, 0.81], [0.66, -0.16, -0.91]]
)


class Potential(nn.Module):
    """Environment vectors, then a network for each element; forces if asked for."""

    def __init__(self, *, forces: bool = False):
        super().__init__()
        from torchani.nn import ANINetworks, AtomicNetwork

        self.vectors = environment()
        sizes = (self.vectors.out_dim, 8, 1)
        self.networks = ANINetworks({symbol: AtomicNetwork(sizes) for symbol in ELEMENTS})
        self.forces = forces

    def forward(self, species: torch.Tensor, coordinates: torch.Tensor) -> Any:
        if not self.forces:
            return self.networks(species, self.vectors(species, coordinates))
        coordinates = coordinates if coordinates.requires_grad else coordinates.detach().requires_grad_()
        with torch.enable_grad():
            energies = self.networks(species, self.vectors(species, coordinates))
            return -torch.autograd.grad(energies.sum(), coordinates, create_graph=True)[0]


def environment() -> nn.Module:
    from torchani.aev import AEVComputer

    return AEVComputer.like_1x(num_species=len(ELEMENTS))


def methane() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[1, 0, 0, 0, 0]]), (METHANE + 0.05 * torch.randn(5, 3))[None]


test_torchani = zoo_test(
    "torchani",
    Specimen("AEVComputer", environment, methane),
    Specimen("energies", Potential, methane),
    Specimen("forces", lambda: Potential(forces=True), methane),
)
