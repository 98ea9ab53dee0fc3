"""torchdiffeq: neural ordinary differential equations, with and without the adjoint method."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen


class Field(nn.Module):
    """A vector field."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y) * torch.cos(t)


class Trajectory(nn.Module):
    """The states at given times."""

    def __init__(self, solver: str, **options: Any):
        super().__init__()
        self.field, self.solver, self.options = Field(), solver, options

    def forward(self, y: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        import torchdiffeq

        return getattr(torchdiffeq, self.solver)(self.field, y, times, **self.options)


class Classifier(nn.Module):
    """An ODE block between two layers; the times are a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.field, self.head = nn.Linear(3, 2), Field(), nn.Linear(2, 2)
        self.register_buffer("times", torch.tensor([0.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torchdiffeq import odeint

        return self.head(odeint(self.field, self.encoder(x), self.times, method="rk4")[-1])


def start() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 2), torch.tensor([0.0, 0.4, 1.0])


SMOOTH = {"rtol": 1e-7, "atol": 1e-9}
STATES_ONLY = {"maps": lambda x: x.dim() > 1}

test_torchdiffeq = zoo_test(
    "torchdiffeq",
    Specimen("rk4", lambda: Trajectory("odeint", method="rk4"), start, **STATES_ONLY),
    Specimen("dopri5", lambda: Trajectory("odeint", **SMOOTH), start, **STATES_ONLY),
    Specimen("rk4, adjoint", lambda: Trajectory("odeint_adjoint", method="rk4"), start, **STATES_ONLY),
    Specimen("dopri5, adjoint", lambda: Trajectory("odeint_adjoint", **SMOOTH), start, **STATES_ONLY),
    Specimen("classifier", Classifier, lambda: (torch.randn(4, 3),)),
)
