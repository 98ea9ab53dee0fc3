"""x-transformers: decoders, encoders and their options."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

VOCABULARY, LENGTH = 20, 6
SIZES = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}


def language_model(kind: str = "Decoder", **options: Any) -> nn.Module:
    import x_transformers

    layers = getattr(x_transformers, kind)(**SIZES, **options)
    return x_transformers.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)


def continuous() -> nn.Module:
    import x_transformers

    return x_transformers.ContinuousTransformerWrapper(
        dim_in=3, dim_out=2, max_seq_len=LENGTH, attn_layers=x_transformers.Encoder(**SIZES)
    )


def vision() -> nn.Module:
    import x_transformers

    return x_transformers.ViTransformerWrapper(
        image_size=8, patch_size=4, num_classes=3, attn_layers=x_transformers.Encoder(**SIZES)
    )


def cross_attention() -> nn.Module:
    import x_transformers

    return x_transformers.CrossAttender(dim=16, depth=1, heads=2, attn_dim_head=8)


def tokens() -> tuple[torch.Tensor]:
    return (torch.randint(VOCABULARY, (2, LENGTH)),)


def every(x: torch.Tensor) -> bool:
    return True


SINGLE = {"smooth": False}  # its softmax is in float32
TEXT = {"maps": every, **SINGLE}
MODERN = {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True}
DROPOUT = {"attn_dropout": 0.2, "ff_dropout": 0.2}

test_x_transformers = zoo_test(
    "x_transformers",
    Specimen("decoder", language_model, tokens, **TEXT),
    Specimen("decoder, rotary and GLU", lambda: language_model(**MODERN), tokens, **TEXT),
    Specimen("decoder, ALiBi", lambda: language_model(alibi_pos_bias=True, attn_kv_heads=1), tokens, **TEXT),
    Specimen("decoder, fused attention", lambda: language_model(attn_flash=True), tokens, **TEXT),
    Specimen("decoder, dropout", lambda: language_model(**DROPOUT), tokens, **TEXT, random=True),
    Specimen("decoder, layer dropout", lambda: language_model(layer_dropout=0.3), tokens, **TEXT, random=True),
    Specimen("encoder", lambda: language_model("Encoder", rel_pos_bias=True), tokens, **TEXT),
    Specimen("continuous", continuous, lambda: (torch.randn(2, LENGTH, 3),), **SINGLE),
    Specimen("vision", vision, lambda: (torch.randn(2, 3, 8, 8),), **SINGLE),
    Specimen("cross attention", cross_attention, lambda: (torch.randn(2, 4, 16), torch.randn(2, 5, 16)), **SINGLE),
)
