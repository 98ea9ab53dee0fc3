"""Torch layers of every kind with example inputs: what the layer tests run in torch and in JAX."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import torch
from custom_layers import (
    Channels,
    Counting,
    Gated,
    NoParameters,
    OnPlainTensor,
    ParameterContainers,
    ResNet18,
    TiedAutoencoder,
)
from torch import nn
from torch.nn.utils import parametrizations

randn = torch.randn


@dataclass(frozen=True)
class LayerSpec:
    """A layer and how to call it."""

    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[Any, ...]]
    """Draws positional arguments: tensors, pytrees of them, static values."""
    keywords: Callable[[], dict[str, Any]] = dict
    x64: bool = False
    loops: bool = False
    """Whether torch.func.vmap lacks rules for it, so that vmap runs as a loop, with a warning."""
    tolerance: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)
    """Those of `TorchModule`."""
    stateful: bool = False
    """Whether it changes its buffers in training mode."""
    random: Literal["never", "in training", "always"] = "never"
    note: str = ""
    """What a user should know of it."""

    def draw(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.arguments(), self.keywords()

    def draw_batch(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments whose tensors have a leading axis of `size`."""
        return jax.tree.map(_stack, *(self.draw() for _ in range(size)))


def looped(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """`function` example by example, in torch: what its vmap has to give."""

    def loop(*args: Any, **kwargs: Any) -> Any:
        rows = [jax.tree.map(lambda x: _row(x, i), (args, kwargs)) for i in range(size)]
        return jax.tree.map(_stack, *(function(*a, **k) for a, k in rows))

    return loop


def _stack(first: Any, *others: Any) -> Any:
    return torch.stack([first, *others]) if isinstance(first, torch.Tensor) else first


def _row(leaf: Any, i: int) -> Any:
    return leaf[i].clone() if isinstance(leaf, torch.Tensor) else leaf


def in_eval(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make`, in evaluation mode."""
    return lambda: make().eval()


def _warm_batchnorm(make: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    """A normalisation layer whose running statistics are not the initial ones, in evaluation mode."""

    def warm() -> nn.Module:
        module = make()
        for _ in range(3):
            module(2 * randn(shape) + 1)
        return module.eval()

    return warm


def _frozen_half() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def _shared_submodule() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.LayerNorm(3)))


def _weight_norm_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many a checkpoint
        return nn.utils.weight_norm(nn.Linear(3, 4))


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


def _causal(n: int) -> torch.Tensor:
    return torch.ones(n, n).triu(1).bool()


def _padding(batch: int, n: int) -> torch.Tensor:
    return (torch.arange(n) >= n - 1).expand(batch, n).clone()


LINEAR = [
    LayerSpec("Linear", lambda: nn.Linear(3, 4), lambda: (randn(5, 3),)),
    LayerSpec("Linear-no-bias", lambda: nn.Linear(3, 4, bias=False), lambda: (randn(3),)),
    LayerSpec("Bilinear", lambda: nn.Bilinear(3, 4, 2), lambda: (randn(5, 3), randn(5, 4)), loops=True),
    LayerSpec("PReLU", lambda: nn.PReLU(3), lambda: (randn(5, 3),)),
    LayerSpec("Embedding", lambda: nn.Embedding(10, 4, padding_idx=0), lambda: (torch.randint(10, (2, 5)),)),
    LayerSpec(
        "EmbeddingBag", lambda: nn.EmbeddingBag(10, 4, mode="sum"), lambda: (torch.randint(10, (2, 5)),), loops=True
    ),
    LayerSpec(
        "EmbeddingBag-weighted",
        lambda: nn.EmbeddingBag(10, 4, mode="sum"),
        lambda: (torch.randint(10, (6,)), torch.tensor([0, 2])),
        lambda: {"per_sample_weights": randn(6)},
        loops=True,
    ),
    LayerSpec("Linear-frozen", _frozen_half, lambda: (randn(5, 3),)),
]

CONVOLUTIONS = [
    LayerSpec("Conv1d", lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), lambda: (randn(2, 3, 9),)),
    LayerSpec("Conv2d", lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), lambda: (randn(2, 4, 9, 8),)),
    LayerSpec(
        "Conv2d-circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), lambda: (randn(2, 5, 5),)
    ),
    LayerSpec("Conv3d", lambda: nn.Conv3d(2, 3, 2), lambda: (randn(2, 2, 4, 5, 3),)),
    LayerSpec("ConvTranspose1d", lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), lambda: (randn(2, 3, 5),)),
    LayerSpec(
        "ConvTranspose2d",
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2),
        lambda: (randn(2, 4, 3, 4),),
    ),
    LayerSpec("ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), lambda: (randn(1, 2, 3, 3, 2),)),
    LayerSpec(
        "Conv2d-channels_last",
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda: (randn(2, 3, 6, 5).to(memory_format=torch.channels_last),),
    ),
    LayerSpec("ResNet-18", _warm_batchnorm(lambda: ResNet18(width=4), 4, 3, 32, 32), lambda: (randn(2, 3, 32, 32),)),
]

NORMALISATION = [
    LayerSpec("LayerNorm", lambda: nn.LayerNorm((3, 4)), lambda: (randn(2, 3, 4),)),
    LayerSpec("GroupNorm", lambda: nn.GroupNorm(2, 4), lambda: (randn(2, 4, 5),)),
    LayerSpec("RMSNorm", lambda: nn.RMSNorm(4), lambda: (randn(2, 3, 4),)),
    LayerSpec("InstanceNorm2d", lambda: nn.InstanceNorm2d(3, affine=True), lambda: (randn(2, 3, 4, 5),)),
    LayerSpec("BatchNorm1d", _warm_batchnorm(lambda: nn.BatchNorm1d(3), 8, 3), lambda: (randn(5, 3),), stateful=True),
    LayerSpec(
        "BatchNorm2d",
        _warm_batchnorm(lambda: nn.BatchNorm2d(3), 8, 3, 4, 4),
        lambda: (randn(2, 3, 4, 5),),
        stateful=True,
    ),
    LayerSpec(
        "BatchNorm1d-training-without-statistics",
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        lambda: (randn(5, 3),),
    ),
]

ATTENTION = [
    LayerSpec("MultiheadAttention", _attention(), lambda: (x := randn(2, 5, 8), x, x)),
    LayerSpec(
        "MultiheadAttention-masks",
        _attention(kdim=6, vdim=4),
        lambda: (
            randn(2, 5, 8),
            randn(2, 5, 6),
            randn(2, 5, 4),
        ),
        lambda: {"key_padding_mask": _padding(2, 5), "attn_mask": _causal(5), "average_attn_weights": False},
    ),
    LayerSpec(
        "MultiheadAttention-no-weights",
        _attention(add_bias_kv=True),
        lambda: (randn(2, 5, 8), randn(2, 4, 8), randn(2, 4, 8)),
        lambda: {"need_weights": False},
    ),
    LayerSpec(
        "TransformerEncoder",
        in_eval(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)),
        lambda: (randn(2, 5, 8),),
        lambda: {"src_key_padding_mask": _padding(2, 5)},
        random="in training",
    ),
    LayerSpec(
        "TransformerEncoderLayer-norm-first",
        in_eval(lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True, batch_first=True)),
        lambda: (randn(2, 5, 8),),
        random="in training",
    ),
    LayerSpec(
        "TransformerDecoderLayer",
        in_eval(lambda: nn.TransformerDecoderLayer(8, 2, 16)),
        lambda: (randn(5, 2, 8), randn(4, 2, 8)),
        lambda: {"tgt_mask": _causal(5), "tgt_is_causal": True},
        random="in training",
    ),
]

RECURRENT = [
    LayerSpec(
        "LSTM",
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        lambda: (randn(2, 5, 3), (randn(4, 2, 4), randn(4, 2, 4))),
        loops=True,
    ),
    LayerSpec("LSTM-projection", lambda: nn.LSTM(3, 4, proj_size=2), lambda: (randn(5, 2, 3),), loops=True),
    LayerSpec("GRU", lambda: nn.GRU(3, 4), lambda: (randn(5, 2, 3), randn(1, 2, 4)), loops=True),
    LayerSpec("RNN", lambda: nn.RNN(3, 4, nonlinearity="relu"), lambda: (randn(5, 3),), loops=True),
    LayerSpec("LSTMCell", lambda: nn.LSTMCell(3, 4), lambda: (randn(2, 3), (randn(2, 4), randn(2, 4))), loops=True),
    LayerSpec("GRUCell", lambda: nn.GRUCell(3, 4), lambda: (randn(2, 3), randn(2, 4)), loops=True),
]

PARAMETRIZED = [
    LayerSpec("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(3, 4)), lambda: (randn(5, 3),)),
    LayerSpec("weight_norm-hook", _weight_norm_hook, lambda: (randn(5, 3),)),
    LayerSpec(
        "spectral_norm", in_eval(lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 2))), lambda: (randn(2, 3, 5),)
    ),
    LayerSpec("spectral_norm-hook", in_eval(lambda: nn.utils.spectral_norm(nn.Linear(3, 4))), lambda: (randn(5, 3),)),
    LayerSpec("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 4)), lambda: (randn(5, 4),)),
    LayerSpec("tied-weights", lambda: TiedAutoencoder(5, 3), lambda: (torch.randint(5, (4,)),)),
]

CONTAINERS = [
    LayerSpec("shared-submodule", _shared_submodule, lambda: (randn(5, 3),)),
    LayerSpec(
        "writes-into-its-input", lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4)), lambda: (randn(5, 3),)
    ),
    LayerSpec("ParameterList-ParameterDict", lambda: ParameterContainers(3), lambda: (randn(5, 3),)),
    LayerSpec("Sequential-ModuleList", lambda: Gated(3, 4, 3), lambda: ({"x": randn(5, 3), "gates": [randn(4)] * 3},)),
    LayerSpec("buffers", lambda: Channels(4), lambda: (randn(5, 4),)),
    LayerSpec("counting-attribute-in-eval", in_eval(lambda: Counting(3)), lambda: (randn(5, 3),)),
    LayerSpec("no-parameters", NoParameters, lambda: (randn(5, 3), 2.5)),
    LayerSpec("plain-tensor-attribute", lambda: OnPlainTensor(3), lambda: (randn(5, 3),)),
]

DTYPES = [
    LayerSpec(
        "complex64", lambda: nn.Linear(3, 4, dtype=torch.complex64), lambda: (randn(5, 3, dtype=torch.complex64),)
    ),
    LayerSpec(
        "complex128",
        lambda: nn.Conv1d(2, 3, 2, dtype=torch.complex128),
        lambda: (randn(2, 2, 4, dtype=torch.complex128),),
        x64=True,
    ),
    LayerSpec("float64", lambda: nn.LayerNorm(3).double(), lambda: (randn(5, 3, dtype=torch.float64),), x64=True),
    LayerSpec("bfloat16", lambda: nn.Linear(3, 4).bfloat16(), lambda: (randn(5, 3).bfloat16(),), tolerance=1e-2),
    LayerSpec(
        "float16",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU()).half(),
        lambda: (randn(5, 3).half(),),
        tolerance=1e-3,
    ),
]

SPECS = [
    *LINEAR,
    *CONVOLUTIONS,
    *NORMALISATION,
    *ATTENTION,
    *RECURRENT,
    *PARAMETRIZED,
    *CONTAINERS,
    *DTYPES,
]
