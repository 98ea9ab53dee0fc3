"""MACE: energies, and forces by autograd inside the model; every model holds scripted code of e3nn."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

torch.serialization.add_safe_globals([slice])  # e3nn 0.4 loads constants that hold slices when it is imported

ATOMS = 3


class Water(nn.Module):
    """A MACE model of one molecule: the dictionary that MACE asks for, from positions."""

    def __init__(self, name: str, *, forces: bool, **options: Any):
        super().__init__()
        from e3nn import o3
        from mace.modules import interaction_classes, models

        interaction = interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.model = getattr(models, name)(
            r_max=4.0,
            num_bessel=4,
            num_polynomial_cutoff=3,
            max_ell=2,
            interaction_cls=interaction,
            interaction_cls_first=interaction,
            num_interactions=2,
            num_elements=2,
            hidden_irreps=o3.Irreps("4x0e+4x1o"),
            MLP_irreps=o3.Irreps("4x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=torch.tensor([-1.0, -3.0]).double().numpy(),
            avg_num_neighbors=2.0,
            atomic_numbers=[1, 8],
            correlation=2,
            **options,
        )
        self.forces = forces
        pairs = [(i, j) for i in range(ATOMS) for j in range(ATOMS) if i != j]
        self.register_buffer("edges", torch.tensor(pairs).T.contiguous())
        self.register_buffer("elements", torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))

    def forward(self, positions: torch.Tensor) -> Any:
        shifts = positions.new_zeros(self.edges.shape[1], 3)
        data = {
            "positions": positions,
            "node_attrs": self.elements.to(positions.dtype),
            "edge_index": self.edges,
            "shifts": shifts,
            "unit_shifts": shifts,
            "cell": positions.new_zeros(3, 3),
            "batch": torch.zeros(ATOMS, dtype=torch.long),
            "ptr": torch.tensor([0, ATOMS]),
            "head": torch.zeros(1, dtype=torch.long),
        }
        output = self.model(data, training=self.training, compute_force=self.forces)
        return output["forces"] if self.forces else output["energy"]


SCALED = {"atomic_inter_scale": 0.7, "atomic_inter_shift": 0.1}


def positions() -> tuple[torch.Tensor]:
    return (torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.2], [-0.3, 0.9, 0.0]]) + 0.1 * torch.randn(ATOMS, 3),)


def block(name: str, *args: Any, **options: Any) -> nn.Module:
    from mace.modules import blocks

    return getattr(blocks, name)(*args, **options)


def product() -> nn.Module:
    from e3nn import o3

    irreps = o3.Irreps("4x0e+4x1o")
    return block("EquivariantProductBasisBlock", irreps, irreps, correlation=2, num_elements=2, use_sc=False)


def product_arguments() -> tuple[torch.Tensor, None, torch.Tensor]:
    return torch.randn(3, 4, 4), None, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])


def radial() -> nn.Module:
    return block("RadialEmbeddingBlock", r_max=4.0, num_bessel=4, num_polynomial_cutoff=3)


def radial_arguments() -> tuple[torch.Tensor, ...]:
    return (
        1 + torch.rand(5, 1),
        torch.ones(3, 2),
        torch.tensor([[0, 1, 2, 0, 1], [1, 2, 0, 2, 0]]),
        torch.tensor([1, 8]),
    )


test_mace = zoo_test(
    "mace",
    Specimen("RadialEmbeddingBlock", radial, radial_arguments, output=lambda y: y[0] if isinstance(y, tuple) else y),
    Specimen("EquivariantProductBasisBlock", product, product_arguments, maps=lambda x: x.dim() == 3),
    Specimen("MACE, energy", lambda: Water("MACE", forces=False), positions),
    Specimen("ScaleShiftMACE, energy", lambda: Water("ScaleShiftMACE", forces=False, **SCALED), positions),
    Specimen(
        "ScaleShiftMACE, forces", lambda: Water("ScaleShiftMACE", forces=True, **SCALED), positions, training=True
    ),
)
