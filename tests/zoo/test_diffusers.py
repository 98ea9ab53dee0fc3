"""diffusers: U-Nets, autoencoders and diffusion transformers."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen


def model(name: str, **options: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)


BLOCKS = {"layers_per_block": 1, "block_out_channels": (4, 8), "norm_num_groups": 2}
DOWN_AND_UP = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 6,
}
SAMPLES = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "attention_head_dim": 4}


def autoencoder() -> nn.Module:
    return model(
        "AutoencoderKL",
        in_channels=2,
        out_channels=2,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **BLOCKS,
    )


def unet_1d() -> nn.Module:
    return model(
        "UNet1DModel",
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        extra_in_channels=64,
    )


def transformer() -> nn.Module:
    return model(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        norm_num_groups=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=10,
    )


def sample_of(output: Any) -> torch.Tensor:
    return output.sample


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 2, 8, 8), torch.tensor([3, 7])


test_diffusers = zoo_test(
    "diffusers",
    Specimen("UNet2DModel", lambda: model("UNet2DModel", **SAMPLES, **BLOCKS, **DOWN_AND_UP), noisy, output=sample_of),
    Specimen(
        "UNet2DConditionModel",
        lambda: model("UNet2DConditionModel", **SAMPLES, **BLOCKS, **CROSS),
        lambda: (*noisy(), torch.randn(2, 3, 6)),
        output=sample_of,
    ),
    Specimen("UNet1DModel", unet_1d, lambda: (torch.randn(2, 2, 16), torch.tensor([3, 7])), output=sample_of),
    Specimen("AutoencoderKL", autoencoder, lambda: noisy()[:1], output=sample_of),
    Specimen(
        "DiTTransformer2DModel", transformer, lambda: (*noisy(), torch.tensor([1, 2])), output=sample_of, random=True
    ),
)
