"""vector-quantize-pytorch: codebooks, learned by gradients or by moving averages."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen


def quantizer(name: str, **options: Any) -> nn.Module:
    import vector_quantize_pytorch

    return getattr(vector_quantize_pytorch, name)(**options)


def vectors() -> tuple[torch.Tensor]:
    return (torch.randn(2, 5, 4),)


ROUNDED = {"smooth": False}
BOOK = {"dim": 4, "codebook_size": 8}
AVERAGES = {**BOOK, "decay": 0.8}

test_vector_quantize_pytorch = zoo_test(
    "vector_quantize_pytorch",
    Specimen("VectorQuantize", lambda: quantizer("VectorQuantize", **BOOK), vectors, **ROUNDED),
    Specimen(
        "VectorQuantize, moving averages",
        lambda: quantizer("VectorQuantize", **AVERAGES),
        vectors,
        training=True,
        **ROUNDED,
    ),
    Specimen(
        "VectorQuantize, learned codes",
        lambda: quantizer("VectorQuantize", **BOOK, learnable_codebook=True, ema_update=False),
        vectors,
        training=True,
        **ROUNDED,
    ),
    Specimen(
        "VectorQuantize, cosine", lambda: quantizer("VectorQuantize", **BOOK, use_cosine_sim=True), vectors, **ROUNDED
    ),
    Specimen(
        "ResidualVQ", lambda: quantizer("ResidualVQ", **AVERAGES, num_quantizers=2), vectors, training=True, **ROUNDED
    ),
    Specimen("FSQ", lambda: quantizer("FSQ", levels=[4, 3], dim=4), vectors, **ROUNDED),
    Specimen("LFQ", lambda: quantizer("LFQ", codebook_size=8, dim=4), vectors, training=True, **ROUNDED),
    Specimen("SimVQ", lambda: quantizer("SimVQ", **BOOK), vectors, **ROUNDED),
)
