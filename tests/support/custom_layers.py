"""Torch modules that torch.nn does not have: one for each way users hold weights and state."""

import itertools
from typing import Any

import torch
from torch import nn


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class ResNet18(nn.Module):
    """ResNet-18 as in torchvision (He et al., 2015), in-place ReLUs and sums included."""

    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_BasicBlock(a, b, 1 if i == 0 else 2), _BasicBlock(b, b, 1))
                for i, (a, b) in enumerate(itertools.pairwise(widths))
            )
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(8 * width, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


class TiedAutoencoder(nn.Module):
    """Embedding and output projection share one parameter, as in language models."""

    def __init__(self, vocabulary: int, features: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, features)
        self.project = nn.Linear(features, vocabulary)
        self.project.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.project(torch.tanh(self.embed(ids)))


class ParameterContainers(nn.Module):
    """Parameters in lists and dicts, next to one that is frozen."""

    def __init__(self, features: int):
        super().__init__()
        self.scales = nn.ParameterList([torch.randn(features) for _ in range(3)])
        self.shifts = nn.ParameterDict({"in": torch.randn(features), "out": torch.randn(1)})
        self.fixed = nn.Parameter(torch.randn(features), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x + self.shifts["in"]
        for scale in self.scales:
            x = torch.sin(scale * x)
        return {"y": x * self.fixed, "shifted": x.sum(-1) + self.shifts["out"]}


class Gated(nn.Module):
    """Nested containers; a dict of arrays in, nested tuples with None out."""

    def __init__(self, features: int, hidden: int, depth: int):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(features, hidden), nn.Sequential(nn.SiLU(), nn.LayerNorm(hidden)))
        self.layers = nn.ModuleList([nn.ModuleDict({"value": nn.Linear(hidden, hidden)}) for _ in range(depth)])

    def forward(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        x = self.encode(inputs["x"])
        states = []
        for layer, gate in zip(self.layers, inputs["gates"], strict=True):
            x = x + torch.sigmoid(gate) * layer["value"](x)
            states.append(x)
        return x, (states, None), len(states)


class Channels(nn.Module):
    """Integer, boolean and non-persistent buffers."""

    order: torch.Tensor
    keep: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.register_buffer("order", torch.randperm(features))
        self.register_buffer("keep", torch.arange(features) % 2 == 0)
        self.register_buffer("scale", torch.randn(()), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.where(self.keep, x * self.weight, self.scale * x)
        return y[..., self.order], self.order + 1


class Counting(nn.Module):
    """Counts its calls in a plain attribute while it trains."""

    def __init__(self, features: int):
        super().__init__()
        self.linear, self.calls = nn.Linear(features, features), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.linear(x)


class NoParameters(nn.Module):
    """Code only."""

    def forward(self, x: torch.Tensor, power: float = 2.0) -> torch.Tensor:
        return torch.tanh(x).abs() ** power


class OnPlainTensor(nn.Module):
    """Holds a tensor that is neither parameter nor buffer: part of the code, no leaf."""

    def __init__(self, features: int):
        super().__init__()
        self.linear, self.grid = nn.Linear(features, features), torch.linspace(0, 1, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.grid
