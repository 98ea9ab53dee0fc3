"""transformers: small models with dropout, of many architectures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

VOCABULARY, LENGTH = 30, 6
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {**TEXT, **SIZES, "max_position_embeddings": 16, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
LLAMA = {**TEXT, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 16, "attention_dropout": 0.2}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "head_dim": 8}
SEQ2SEQ = {
    **TEXT,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "dropout": 0.2,
    "decoder_start_token_id": 1,
}
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
SPEECH = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (6, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def model(family: str, head: str = "Model", **options: Any) -> Callable[[], nn.Module]:
    """`<family><head>` of transformers, made from a `<family>Config`."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options))

    return build


class Named(nn.Module):
    """A model whose arguments are passed by name; its first output."""

    def __init__(self, make: Callable[[], nn.Module], names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = make(), names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        output = self.model(**dict(zip(self.names, args, strict=True)), use_cache=False, return_dict=True)
        return output[0]


def first(output: Any) -> torch.Tensor:
    return output[0]


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH))


def image() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, 8, 8),)


def text(name: str, make: Callable[[], nn.Module], **options: Any) -> Specimen:
    """A model of token ids, each example of `vmap` with tokens of its own."""
    options = {"random": True, **options}
    return Specimen(name, make, lambda: (tokens(),), output=first, maps=lambda x: True, **options)


def two_texts(name: str, make: Callable[[], nn.Module]) -> Specimen:
    """An encoder and a decoder."""
    return Specimen(
        name,
        lambda: Named(make, ("input_ids", "decoder_input_ids")),
        lambda: (tokens(), tokens()[:, :4]),
        maps=lambda x: True,
        random=True,
    )


def vision(name: str, make: Callable[[], nn.Module], **options: Any) -> Specimen:
    return Specimen(name, make, image, output=first, **{"random": True, **options})


LM = "ForCausalLM"
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.2,
}
GPT2 = {**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.2, "attn_pdrop": 0.2}
DISTIL = {
    **TEXT,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "dropout": 0.2,
    "max_position_embeddings": 16,
}
OPT = {
    **TEXT,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 16,
    "dropout": 0.2,
}
WHISPER = {
    **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 12,
}
CLIP_VISION = {**SIZES, "image_size": 8, "patch_size": 4, "attention_dropout": 0.2}

test_transformers = zoo_test(
    "transformers",
    text("BERT", model("Bert", **BERT)),
    text("RoBERTa", model("Roberta", **{**BERT, "max_position_embeddings": 20})),
    text("DistilBERT", model("DistilBert", **DISTIL)),
    text("ALBERT", model("Albert", **BERT, embedding_size=8)),
    text("ELECTRA", model("Electra", **BERT, embedding_size=8)),
    text("DeBERTa-v2", model("DebertaV2", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    text("MPNet", model("MPNet", **{**BERT, "max_position_embeddings": 20})),
    text("ESM-2", model("Esm", **BERT, position_embedding_type="rotary", mask_token_id=3, token_dropout=True)),
    text("Longformer", model("Longformer", **{**BERT, "max_position_embeddings": 20}, attention_window=4)),
    text("GPT-2", model("GPT2", "LMHeadModel", **GPT2)),
    text("GPT-NeoX", model("GPTNeoX", LM, **BERT, attention_dropout=0.2, hidden_dropout=0.2)),
    text("OPT", model("OPT", LM, **OPT)),
    text("BLOOM", model("Bloom", LM, **TEXT, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.2)),
    text("Llama", model("Llama", LM, **LLAMA)),
    text("Mistral", model("Mistral", LM, **LLAMA, sliding_window=4)),
    text("Qwen2", model("Qwen2", LM, **LLAMA)),
    text("Gemma", model("Gemma", LM, **LLAMA, head_dim=8)),
    text("Phi", model("Phi", LM, **LLAMA, resid_pdrop=0.2)),
    text("Mixtral", model("Mixtral", LM, **EXPERTS, num_local_experts=3)),
    text("Qwen3-MoE", model("Qwen3Moe", LM, **EXPERTS, num_experts=3, moe_intermediate_size=12)),
    text("Mamba", model("Mamba", LM, **TEXT, hidden_size=16, state_size=4, num_hidden_layers=2), random=False),
    two_texts("T5", model("T5", "ForConditionalGeneration", **T5, decoder_start_token_id=0)),
    two_texts("BART", model("Bart", "ForConditionalGeneration", **SEQ2SEQ)),
    Specimen(
        "Whisper",
        lambda: Named(model("Whisper", "ForConditionalGeneration", **WHISPER), ("input_features", "decoder_input_ids")),
        lambda: (torch.randn(2, 8, 20), tokens()[:, :4]),
        random=True,
    ),
    Specimen(
        "wav2vec2",
        model("Wav2Vec2", **{**SIZES, "vocab_size": VOCABULARY}, **SPEECH, hidden_dropout=0.2),
        lambda: (torch.randn(2, 80),),
        output=first,
        random=True,
    ),
    vision("ViT", model("ViT", "ForImageClassification", **VISION)),
    vision("DeiT", model("DeiT", **VISION)),
    vision("DINOv2", model("Dinov2", **VISION, mlp_ratio=2)),
    vision("CLIP", model("CLIPVision", **CLIP_VISION)),
    vision(
        "Swin",
        model(
            "Swin",
            image_size=8,
            patch_size=2,
            embed_dim=8,
            depths=[2],
            num_heads=[2],
            window_size=2,
            drop_path_rate=0.2,
        ),
    ),
    vision("ConvNeXt", model("ConvNext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2), random=False),
    vision(
        "ResNet",
        model("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        random=False,
        training=True,
    ),
)
