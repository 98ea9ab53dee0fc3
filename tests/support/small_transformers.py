"""Small models of transformers with random weights, and inputs for them."""

import inspect
import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports
    import transformers

VOCABULARY = 50
CACHE = "cache" if "cache" in inspect.signature(transformers.GPT2Model.forward).parameters else "past_key_values"
"""The name of a cache, as argument and in outputs: transformers 5.24 has another one."""
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(dropout: float = 0.0) -> torch.nn.Module:
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **_SIZES, **drop))


def gpt2(dropout: float = 0.0) -> torch.nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0))


def llama(dropout: float = 0.0) -> torch.nn.Module:
    sizes = {"vocab_size": VOCABULARY, **_SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, attention_dropout=dropout, bos_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(config)


def t5(dropout: float = 0.0) -> torch.nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens, dropout_rate=dropout))


def vit(dropout: float = 0.0) -> torch.nn.Module:
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_SIZES, **drop, image_size=8, patch_size=4, num_labels=3)
    )


def whisper(dropout: float = 0.0) -> torch.nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "num_mel_bins": 8}
    sizes |= {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    lengths = {"max_source_positions": 10, "max_target_positions": 12}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(**sizes, **lengths, **tokens, dropout=dropout, attention_dropout=dropout)
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2(dropout: float = 0.0, **options: Any) -> torch.nn.Module:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (6, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    drop = {f"{part}_dropout": dropout for part in ("hidden", "activation", "attention", "feat_proj", "final")}
    options = {"layerdrop": 0.0, "apply_spec_augment": False, **options}
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY, **_SIZES, **convolutions, **positions, **drop, **options
    )
    return transformers.Wav2Vec2Model(config)


BUILDERS = {
    "BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
    "T5": t5,
    "ViT": vit,
    "Whisper": whisper,
    "wav2vec2": wav2vec2,
}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return output[CACHE]


def token_ids(*shape: int) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, shape)


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    """Keyword arguments of a model's forward: a batch of two."""
    return {
        "BERT": lambda: {"input_ids": token_ids(2, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])},
        "GPT-2": lambda: {"input_ids": token_ids(2, 7)},
        "Llama": lambda: {"input_ids": token_ids(2, 7)},
        "T5": lambda: {"input_ids": token_ids(2, 7), "decoder_input_ids": token_ids(2, 5)},
        "ViT": lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
        "Whisper": lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": token_ids(2, 5)},
        "wav2vec2": lambda: {"input_values": torch.randn(2, 80)},
    }[name]()
