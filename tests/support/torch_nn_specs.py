"""A spec for every public class of torch.nn, by section of the guide's page on them.

A spec is named after its class, with a suffix where a class has several: `LSTM`, `LSTM-projection`.
"""

from collections.abc import Callable
from typing import Any

import layer_catalogue
import torch
from custom_layers import Gated, ParameterContainers
from layer_catalogue import LayerSpec, randn
from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]

WITHOUT_FORWARD = {
    "Module": "The base class.",
    "Container": "A deprecated base class.",
    "RNNBase": "The base class of `RNN`, `LSTM` and `GRU`.",
    "RNNCellBase": "The base class of `RNNCell`, `LSTMCell` and `GRUCell`.",
}
"""Classes that compute nothing, and what they are: wrap a subclass."""

REFUSED = {"DataParallel": "torch refuses to run it with given weights: wrap `parallel.module` and use JAX's sharding."}
"""Classes that do not work, and why."""

_READS_VALUES = "Reads values."
_DROPOUT = "Random with `dropout`."
_LAZY = "Call the torch module once before wrapping it."
_PART = "Has no forward: as a part of a module."


def _layer(name: str, shape: Shape, *args: Any, **kwargs: Any) -> LayerSpec:
    """A layer of one float tensor."""
    return LayerSpec(name, lambda: _class(name)(*args, **kwargs), lambda: (randn(shape),))


def _normalisation(name: str, shape: Shape, note: str = "", **kwargs: Any) -> LayerSpec:
    """A layer of `shape[1]` channels, with statistics that are not the initial ones."""

    def make() -> nn.Module:
        module = _class(name)(shape[1], **kwargs)
        module(2 * randn(shape) + 1)
        return module

    return LayerSpec(name, make, lambda: (randn(shape),), stateful=True, note=note)


def _lazy(name: str, shape: Shape, *args: Any, **options: Any) -> LayerSpec:
    """A lazy layer after its first call, which has made it an ordinary one."""

    def make() -> nn.Module:
        module = _class(name)(*args)
        module(randn(shape))
        return module

    return LayerSpec(name, make, lambda: (randn(shape),), note=_LAZY, **options)


def _dropout(name: str, shape: Shape = (3, 4)) -> LayerSpec:
    return LayerSpec(name, lambda: _class(name)(0.4), lambda: (randn(shape),), random="in training")


def _loss(name: str, arguments: Callable[[], tuple[Any, ...]], **options: Any) -> LayerSpec:
    return LayerSpec(name, lambda: _class(name)(), arguments, **options)


def _unpool(name: str, shape: Shape) -> LayerSpec:
    max_pool = getattr(F, name.replace("Unpool", "_pool").lower())
    return LayerSpec(name, lambda: _class(name)(2), lambda: max_pool(randn(shape), 2, return_indices=True), loops=True)


def _fractional_pool(name: str, dimensions: int) -> list[LayerSpec]:
    def make(**options: Any) -> nn.Module:
        return _class(name)(2, output_size=3, **options)

    def arguments() -> tuple[Any, ...]:
        return (randn(2, 3, *[7] * dimensions),)

    return [
        LayerSpec(name, make, arguments, random="always", loops=True),
        LayerSpec(f"{name}-samples", lambda: make(_random_samples=torch.rand(2, 3, dimensions)), arguments, loops=True),
    ]


def _class(name: str) -> type[nn.Module]:
    return getattr(nn, name.split("-")[0])


def _labels(*shape: int) -> torch.Tensor:
    return torch.randint(4, shape)


def _signs(*shape: int) -> torch.Tensor:
    return 2 * torch.randint(2, shape) - 1


def _logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(6, 4), _labels(6)


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(6, 4), randn(6, 4)


def _triple() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(6, 4), randn(6, 4), randn(6, 4)


def _ctc() -> tuple[torch.Tensor, ...]:
    return randn(8, 2, 4).log_softmax(-1), torch.randint(1, 4, (2, 3)), torch.tensor([8, 7]), torch.tensor([3, 2])


def _several_labels() -> torch.Tensor:
    """Up to four labels for each example, ended by -1."""
    return torch.tensor([[0, 2, -1, 1], [3, -1, 0, 0]])


def _named(*names: str) -> list[LayerSpec]:
    """The specs of the catalogue for these classes."""
    return [spec for name in names for spec in layer_catalogue.SPECS if class_name(spec) == name]


def class_name(spec: LayerSpec) -> str:
    """The class a spec is for."""
    return spec.name.split("-")[0]


_ACTIVATIONS = [nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU]
_ACTIVATIONS += [nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink]
_ACTIVATIONS += [nn.Softsign, nn.Tanh, nn.Tanhshrink]

SECTIONS: dict[str, list[LayerSpec]] = {
    "Linear layers and embeddings": [
        *_named("Linear", "Bilinear", "Embedding", "EmbeddingBag"),
        _layer("Identity", (3, 4)),
        _lazy("LazyLinear", (5, 3), 4),
    ],
    "Convolutions": [
        *_named("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        *(_lazy(f"LazyConv{n}d", (2, 3, 5, 4, 3)[: n + 2], 2, 2) for n in (1, 2, 3)),
        *(_lazy(f"LazyConvTranspose{n}d", (2, 3, 4, 3, 2)[: n + 2], 2, 2) for n in (1, 2, 3)),
        _layer("Unfold", (2, 3, 4, 5), (2, 3)),
        _layer("Fold", (2, 12, 12), (4, 5), (2, 2)),
    ],
    "Pooling": [
        *(
            _layer(f"{kind}{n}d", (2, 3, 5, 6, 7)[: n + 2], 2)
            for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
            for n in (1, 2, 3)
        ),
        *(_layer(f"LPPool{n}d", (2, 3, 5, 6, 7)[: n + 2], 2, 2) for n in (1, 2, 3)),
        *(_unpool(f"MaxUnpool{n}d", (2, 3, 4, 6, 4)[: n + 2]) for n in (1, 2, 3)),
        *_fractional_pool("FractionalMaxPool2d", 2),
        *_fractional_pool("FractionalMaxPool3d", 3),
    ],
    "Padding": [
        *(
            _layer(f"{kind}Pad{n}d", (2, 3, 3, 4, 5)[: n + 2], 1, *([0.5] if kind == "Constant" else []))
            for kind in ("Circular", "Constant", "Reflection", "Replication", "Zero")
            for n in (1, 2, 3)
        ),
    ],
    "Activations": [
        *(_layer(cls.__name__, (3, 4)) for cls in _ACTIVATIONS),
        *_named("PReLU"),
        _layer("GLU", (3, 4)),
        _layer("Threshold", (3, 4), 0.1, -0.5),
        LayerSpec("RReLU", nn.RReLU, lambda: (randn(3, 4),), loops=True, random="in training"),
        *(_layer(name, (3, 4), -1) for name in ("Softmax", "Softmin", "LogSoftmax")),
        _layer("Softmax2d", (2, 3, 4, 5)),
    ],
    "Normalisation": [
        *_named("LayerNorm", "GroupNorm", "RMSNorm"),
        *_named("BatchNorm1d", "BatchNorm2d"),
        _normalisation("BatchNorm3d", (2, 3, 4, 2, 3)),
        _normalisation("SyncBatchNorm", (4, 3, 2)),
        *(_lazy(f"LazyBatchNorm{n}d", (4, 3, 2, 3, 2)[: n + 2], stateful=True) for n in (1, 2, 3)),
        _layer("InstanceNorm1d", (2, 3, 4), 3),
        *_named("InstanceNorm2d"),
        _layer("InstanceNorm3d", (2, 3, 4, 3, 2), 3),
        *(
            _normalisation(
                f"InstanceNorm{n}d-statistics",
                (2, 3, 4, 3, 2)[: n + 2],
                track_running_stats=True,
                note="State with `track_running_stats`.",
            )
            for n in (1, 2, 3)
        ),
        *(_lazy(f"LazyInstanceNorm{n}d", (2, 3, 4, 3, 2)[: n + 2], stateful=True) for n in (1, 2, 3)),
        _layer("LocalResponseNorm", (2, 5, 3), 3),
        LayerSpec("CrossMapLRN2d", lambda: nn.CrossMapLRN2d(3), lambda: (randn(2, 5, 3, 4),), loops=True),
    ],
    "Recurrent layers": [
        *_named("RNN", "LSTM", "GRU", "LSTMCell", "GRUCell"),
        LayerSpec("RNNCell", lambda: nn.RNNCell(3, 4), lambda: (randn(2, 3), randn(2, 4)), loops=True),
        *(
            LayerSpec(
                f"{name}-dropout",
                lambda name=name: _class(name)(3, 4, num_layers=2, dropout=0.4),
                lambda: (randn(5, 2, 3),),
                loops=True,
                random="in training",
                note=_DROPOUT,
            )
            for name in ("RNN", "LSTM", "GRU")
        ),
    ],
    "Attention": [
        *_named("MultiheadAttention"),
        LayerSpec(
            "MultiheadAttention-dropout",
            lambda: nn.MultiheadAttention(8, 2, dropout=0.4),
            lambda: (x := randn(5, 2, 8), x, x),
            random="in training",
            note=_DROPOUT,
        ),
        *_named("TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer"),
        LayerSpec(
            "TransformerDecoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
            lambda: (randn(2, 5, 8), randn(2, 4, 8)),
            random="in training",
        ),
        LayerSpec(
            "Transformer",
            lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
            lambda: (randn(2, 5, 8), randn(2, 4, 8)),
            random="in training",
        ),
    ],
    "Dropout": [
        *(_dropout(name) for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout")),
        *(_dropout(f"Dropout{n}d", (4, 3, 2, 3, 2)[: n + 2]) for n in (1, 2, 3)),
    ],
    "Distances and losses": [
        LayerSpec("CosineSimilarity", nn.CosineSimilarity, _pair),
        LayerSpec("PairwiseDistance", nn.PairwiseDistance, _pair),
        _loss("L1Loss", _pair),
        _loss("MSELoss", _pair),
        _loss("HuberLoss", _pair),
        _loss("SmoothL1Loss", _pair),
        _loss("CrossEntropyLoss", _logits_and_labels),
        LayerSpec(
            "CrossEntropyLoss-weight-smoothing",
            lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1),
            _logits_and_labels,
            note="Outside `jit` a loop, with both `weight` and `label_smoothing`.",
        ),
        _loss("NLLLoss", _logits_and_labels),
        _loss("NLLLoss2d", lambda: (randn(2, 4, 3, 3), _labels(2, 3, 3)), note="Deprecated in torch."),
        LayerSpec(
            "LinearCrossEntropyLoss",
            lambda: _class("LinearCrossEntropyLoss")(3, 4),
            lambda: (randn(6, 3), _labels(6)),
            note="Since torch 2.13.",
        ),
        LayerSpec(
            "AdaptiveLogSoftmaxWithLoss",
            lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2),
            lambda: (randn(6, 8), torch.randint(12, (6,))),
            loops=True,
            note=_READS_VALUES,
        ),
        _loss("BCELoss", lambda: (torch.rand(6, 4), torch.rand(6, 4))),
        _loss("BCEWithLogitsLoss", lambda: (randn(6, 4), torch.rand(6, 4))),
        LayerSpec(
            "KLDivLoss",
            lambda: nn.KLDivLoss(reduction="batchmean"),
            lambda: (randn(6, 4).log_softmax(-1), randn(6, 4).softmax(-1)),
            loops=True,
        ),
        _loss("PoissonNLLLoss", _pair),
        _loss(
            "GaussianNLLLoss",
            lambda: (randn(6, 4), randn(6, 4), torch.rand(6, 4) + 0.1),
            loops=True,
            note=_READS_VALUES,
        ),
        _loss("CTCLoss", _ctc, loops=True),
        _loss("CosineEmbeddingLoss", lambda: (*_pair(), _signs(6))),
        _loss("HingeEmbeddingLoss", lambda: (randn(6, 4), _signs(6, 4))),
        _loss("MarginRankingLoss", lambda: (randn(6), randn(6), _signs(6)), loops=True),
        _loss("SoftMarginLoss", lambda: (randn(6, 4), _signs(6, 4)), loops=True),
        _loss("MultiMarginLoss", _logits_and_labels, loops=True),
        _loss("MultiLabelMarginLoss", lambda: (randn(2, 4), _several_labels()), loops=True),
        _loss("MultiLabelSoftMarginLoss", lambda: (randn(6, 4), torch.randint(2, (6, 4)))),
        _loss("TripletMarginLoss", _triple, loops=True),
        LayerSpec(
            "TripletMarginWithDistanceLoss",
            lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(), margin=2.0),
            _triple,
        ),
    ],
    "Shapes": [
        _layer("Flatten", (2, 3, 4)),
        _layer("Unflatten", (2, 6), 1, (2, 3)),
        _layer("PixelShuffle", (2, 8, 3, 4), 2),
        _layer("PixelUnshuffle", (2, 3, 4, 6), 2),
        _layer("ChannelShuffle", (2, 6, 3), 3),
        _layer("Upsample", (2, 3, 4, 5), scale_factor=2.0, mode="bicubic"),
        _layer("UpsamplingBilinear2d", (2, 3, 4, 5), scale_factor=2),
        _layer("UpsamplingNearest2d", (2, 3, 4, 5), scale_factor=2),
    ],
    "Containers": [
        LayerSpec("Sequential", lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), lambda: (randn(5, 3),)),
        *(
            LayerSpec(name, lambda: Gated(3, 4, 2), lambda: ({"x": randn(5, 3), "gates": [randn(4)] * 2},), note=_PART)
            for name in ("ModuleList", "ModuleDict")
        ),
        *(
            LayerSpec(name, lambda: ParameterContainers(3), lambda: (randn(5, 3),), note=_PART)
            for name in ("ParameterList", "ParameterDict")
        ),
    ],
}


SPECS = [spec for specs in SECTIONS.values() for spec in specs]
