"""The torch modules of the cases. Each returns one tensor, which every contender can handle."""

import itertools
from collections.abc import Callable

import torch
from torch import nn


class Sequences(nn.Module):
    """A recurrent layer that returns its outputs only."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def transformer(layers: int, width: int, heads: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def cnn() -> nn.Module:
    """Takes one image or a batch of them."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(-3),
        nn.Linear(32 * 7 * 7, 10),
    )


class Bert(nn.Module):
    """A BERT encoder of transformers, randomly initialised; returns the last hidden state."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int):
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            attn_implementation="sdpa",
        )
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).last_hidden_state


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _Bottleneck(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        width = after // 4
        self.narrow = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.widen = nn.Sequential(nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.widen(self.middle(self.narrow(x))) + self.shortcut(x))


class _ResNet(nn.Module):
    """A ResNet for small images (He et al. 2016: 3 x 3 stem, no first pooling)."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], widths: list[int], depths: list[int], classes: int):
        super().__init__()
        blocks = []
        for stage, ((before, after), depth) in enumerate(zip(itertools.pairwise(widths), depths, strict=True)):
            blocks.append(block(before, after, 1 if stage == 0 else 2))
            blocks += [block(after, after, 1) for _ in range(depth - 1)]
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ResNet18(_ResNet):
    def __init__(self, classes: int):
        super().__init__(_Block, [64, 64, 128, 256, 512], [2, 2, 2, 2], classes)


class ResNet50(_ResNet):
    def __init__(self, classes: int):
        super().__init__(_Bottleneck, [64, 256, 512, 1024, 2048], [3, 4, 6, 3], classes)
