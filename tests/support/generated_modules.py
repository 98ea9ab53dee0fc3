"""Random torch modules: `generate(seed)` composes layers by the shapes they take, from a grammar.

A module takes a batch of examples: vectors `(N, F)`, sequences `(N, T, F)`, images `(N, C, H, W)` or ids `(N, T)`. The
seed decides everything. What torch itself cannot differentiate, as a write into a tensor that the backward pass needs,
is drawn again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from generated_layers import (
    WEIGHT_WRITES,
    WRITES,
    Buffers,
    First,
    Gate,
    Noise,
    Parallel,
    Residual,
    SelfAttention,
    Tied,
    Tokens,
    Write,
    WritesWeight,
    quieted,
)
from torch import nn
from torch.nn.utils import parametrizations

BATCH, VOCABULARY, MAX_PARTS = 3, 7, 40
Shape = tuple[int, ...]
"""That of one example."""
Rule = Callable[[Random, Shape], nn.Module]


@dataclass(frozen=True)
class Generated:
    """A module and the kind of input it takes."""

    seed: int
    module: nn.Module
    shape: Shape
    ids: bool

    def inputs(self, *lead: int) -> torch.Tensor:
        """Input batches, as many as `lead` says; the same ones each time."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.ids:
            return torch.randint(VOCABULARY, (*lead, BATCH, *self.shape), generator=generator)
        return torch.randn(*lead, BATCH, *self.shape, generator=generator)

    def __repr__(self) -> str:
        return f"seed {self.seed}, takes {'ids' if self.ids else 'values'} {(BATCH, *self.shape)}:\n{self.module}"


def generate(seed: int) -> Generated:
    """The module of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = Random(seed)
        while True:
            generated = _draw(seed, rng)
            modules = generated.module, quieted(generated.module)
            small = len(list(generated.module.modules())) <= MAX_PARTS
            if small and all(_is_differentiable(module, generated.inputs()) for module in modules):
                return generated


def _draw(seed: int, rng: Random) -> Generated:
    ids = rng.random() < 0.15
    shape = tuple(rng.randint(3, 5) for _ in range(2 if ids else rng.choice((1, 2, 2, 3))))
    if ids:
        embedding = nn.Embedding(VOCABULARY, shape[-1], max_norm=rng.choice((None, 1.0, 1.5)))
        module = Tokens(embedding, _sequential(rng, shape, depth=2))
    else:
        module = _sequential(rng, shape, depth=2)
    for parameter in module.parameters():
        parameter.requires_grad_(rng.random() < 0.85)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.Dropout) and rng.random() < 0.2:
            part.eval()
    if rng.random() < 0.25:
        module.eval()
    return Generated(seed, module, shape[:1] if ids else shape, ids)


def _is_differentiable(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether torch computes the module's gradients, and finite values that rounding errors do not drown."""
    module = copy.deepcopy(module)
    x = x.requires_grad_() if x.is_floating_point() else x
    try:
        y = module(x.clone())
        if y.requires_grad:
            y.square().sum().backward()
    except RuntimeError as exc:
        if "modified by an inplace operation" in str(exc):
            return False
        raise
    grads = [t.grad for t in (x, *module.parameters()) if t.grad is not None]
    return all(bool(torch.isfinite(t).all()) and t.abs().max() < 1e3 for t in (y, *grads))


# --- combinations --------------------------------------------------------------------------------


def _sequential(rng: Random, shape: Shape, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(rng.randint(2, 4)):
        layer = _module(rng, shape, depth)
        layers.append(layer)
        shape = _shape_after(layer, shape)
    return nn.Sequential(*layers)


def _module(rng: Random, shape: Shape, depth: int) -> nn.Module:
    if depth and rng.random() < 0.4:
        return rng.choice(_COMBINATIONS)(rng, shape, depth - 1)
    return rng.choice((*_EVERYWHERE, *2 * _OF_RANK[len(shape)]))(rng, shape)


def _preserving(rng: Random, shape: Shape, depth: int) -> nn.Module:
    """A module that gives the shape it takes."""
    module = rng.choice((_module, _sequential))(rng, shape, depth)
    after = _shape_after(module, shape)
    if after == shape:
        return module
    adapter = nn.Linear(after.numel(), torch.Size(shape).numel())
    return nn.Sequential(module, nn.Flatten(), adapter, nn.Unflatten(1, shape))


def _shape_after(module: nn.Module, shape: Shape) -> torch.Size:
    with torch.no_grad():
        return copy.deepcopy(module)(torch.zeros(BATCH, *shape)).shape[1:]


def _branches(rng: Random, shape: Shape, depth: int) -> nn.Module:
    return Parallel([_preserving(rng, shape, depth) for _ in range(2)])


def _gate(rng: Random, shape: Shape, depth: int) -> nn.Module:
    return Gate(_preserving(rng, shape, depth), _preserving(rng, shape, depth))


def _residual(rng: Random, shape: Shape, depth: int) -> nn.Module:
    return Residual(_preserving(rng, shape, depth), in_place=rng.random() < 0.5)


def _shared(rng: Random, shape: Shape, depth: int) -> nn.Module:
    """One module in two places."""
    part = _preserving(rng, shape, depth)
    return nn.Sequential(part, _activation(rng, shape), nn.Sequential(part))


_COMBINATIONS = (_sequential, _residual, _residual, _branches, _gate, _shared)


# --- layers --------------------------------------------------------------------------------------


def _activation(rng: Random, shape: Shape) -> nn.Module:
    make = rng.choice((nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.CELU, nn.Tanh, nn.GELU, nn.Sigmoid))
    return make() if make in (nn.Tanh, nn.GELU, nn.Sigmoid) else make(inplace=rng.random() < 0.6)


def _dropout(rng: Random, shape: Shape) -> nn.Module:
    make = rng.choice((nn.Dropout, nn.Dropout, nn.AlphaDropout, nn.Dropout1d if len(shape) == 2 else nn.Dropout))
    return make(rng.choice((0.0, 0.2, 0.5)), inplace=rng.random() < 0.3)


def _linear(rng: Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], rng.randint(3, 5), bias=rng.random() < 0.8)


def _parametrized(rng: Random, shape: Shape) -> nn.Module:
    wrap = rng.choice((parametrizations.weight_norm, parametrizations.spectral_norm))
    return wrap(nn.Linear(shape[-1], rng.randint(3, 5)))


def _writes_weight(rng: Random, shape: Shape) -> nn.Module:
    return WritesWeight(shape[-1], rng.randint(3, 5), rng.choice((*WEIGHT_WRITES,)))


def _write(rng: Random, shape: Shape) -> nn.Module:
    return Write(shape[-1], rng.choice((*WRITES,)))


def _buffers(rng: Random, shape: Shape) -> nn.Module:
    return Buffers(shape[-1], rng.choice(Buffers.KINDS), persistent=rng.random() < 0.8)


def _norm(rng: Random, shape: Shape) -> nn.Module:
    return rng.choice((nn.LayerNorm, nn.RMSNorm))(shape[-1], eps=1e-2)


def _batch_norm(rng: Random, shape: Shape) -> nn.Module:
    return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(
        shape[0],
        eps=1e-2,  # the usual one divides by what rounding leaves of a constant
        momentum=rng.choice((0.1, 0.5, None)),
        affine=rng.random() < 0.7,
        track_running_stats=rng.random() < 0.9,
    )


def _unflatten(rng: Random, shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[-1], 6), nn.Unflatten(-1, rng.choice(((2, 3), (3, 2)))))


def _conv1d(rng: Random, shape: Shape) -> nn.Module:
    return nn.Conv1d(shape[0], rng.randint(2, 4), rng.choice((1, 3)), padding=1)


def _pool1d(rng: Random, shape: Shape) -> nn.Module:
    return rng.choice((nn.MaxPool1d, nn.AvgPool1d))(2, stride=1, padding=1)


def _attention(rng: Random, shape: Shape) -> nn.Module:
    heads = rng.choice([h for h in (1, 2, shape[-1]) if shape[-1] % h == 0])
    return SelfAttention(shape[-1], heads, dropout=rng.choice((0.0, 0.0, 0.3)), batch_first=True)


def _encoder(rng: Random, shape: Shape) -> nn.Module:
    return nn.TransformerEncoderLayer(
        shape[-1],
        1,
        6,
        dropout=rng.choice((0.0, 0.2)),
        norm_first=rng.random() < 0.5,
        layer_norm_eps=1e-2,
        batch_first=True,
    )


def _recurrent(rng: Random, shape: Shape) -> nn.Module:
    make, layers = rng.choice((nn.LSTM, nn.GRU)), rng.choice((1, 2))
    dropout = rng.choice((0.0, 0.3)) if layers > 1 else 0.0
    return First(make(shape[-1], 3, layers, dropout=dropout, bidirectional=rng.random() < 0.3, batch_first=True))


def _conv2d(rng: Random, shape: Shape) -> nn.Module:
    mode = rng.choice(("zeros", "circular"))
    return nn.Conv2d(shape[0], rng.randint(2, 4), 3, stride=rng.choice((1, 2)), padding=1, padding_mode=mode)


def _pool2d(rng: Random, shape: Shape) -> nn.Module:
    return rng.choice((nn.MaxPool2d(2, stride=1, padding=1), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2)))


def _channel_norm(rng: Random, shape: Shape) -> nn.Module:
    return rng.choice((nn.GroupNorm(1, shape[0], eps=1e-2), nn.InstanceNorm2d(shape[0], eps=1e-2, affine=True)))


def _flatten(rng: Random, shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(rng.choice((1, -2))), nn.Identity())


_EVERYWHERE: tuple[Rule, ...] = (
    _linear,
    _linear,
    _activation,
    _activation,
    _write,
    _write,
    _writes_weight,
    _buffers,
    _norm,
    _dropout,
    _parametrized,
    lambda rng, shape: Tied(shape[-1], 4),
    lambda rng, shape: Noise(rng.choice(Noise.KINDS)),
    lambda rng, shape: nn.Softmax(-1),
)
_OF_RANK: dict[int, tuple[Rule, ...]] = {
    1: (_batch_norm, _unflatten, _linear),
    2: (_batch_norm, _conv1d, _pool1d, _attention, _encoder, _recurrent, _flatten),
    3: (_batch_norm, _conv2d, _pool2d, _channel_norm, lambda rng, shape: nn.Dropout2d(0.3), _flatten),
}
