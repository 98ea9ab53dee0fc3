"""Zuko: flows as lazy distributions, conditioned on a context."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

FEATURES, CONTEXT = 3, 2


class LogDensity(nn.Module):
    """`flow(context).log_prob(x)`."""

    def __init__(self, name: str, **options: Any):
        super().__init__()
        import zuko

        self.flow = getattr(zuko.flows, name)(FEATURES, CONTEXT, **options)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.flow(context).log_prob(x)


def monotonic() -> nn.Module:
    import zuko

    return zuko.nn.MonotonicMLP(FEATURES, 2, hidden_features=(8, 8))


def masked() -> nn.Module:
    import zuko

    return zuko.nn.MaskedMLP(torch.tril(torch.ones(FEATURES, FEATURES, dtype=torch.bool)), hidden_features=(8,))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, FEATURES), torch.randn(5, CONTEXT)


SMALL = {"transforms": 2, "hidden_features": (8,)}

test_zuko = zoo_test(
    "zuko",
    Specimen("NSF", lambda: LogDensity("NSF", bins=4, **SMALL), pairs),
    Specimen("MAF", lambda: LogDensity("MAF", **SMALL), pairs),
    Specimen("NICE", lambda: LogDensity("NICE", **SMALL), pairs),
    Specimen(
        "UNAF",
        lambda: LogDensity("UNAF", signal=4, network={"hidden_features": (8,)}, **SMALL),
        pairs,
        not_asked={"finite differences": "its values are those of a quadrature, its gradients of the integral"},
    ),
    Specimen("CNF", lambda: LogDensity("CNF", freqs=2, hidden_features=(8,)), pairs, training=True),
    Specimen("MonotonicMLP", monotonic, lambda: (torch.randn(5, FEATURES),)),
    Specimen("MaskedMLP", masked, lambda: (torch.randn(5, FEATURES),)),
)
