"""peft: adapters around frozen layers, of an own model and of a language model."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

VOCABULARY = 20


class Perceptron(nn.Module):
    """peft's own example of a model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


def adapted(config: str, **options: Any) -> nn.Module:
    import peft

    chosen = getattr(peft, config)(target_modules=["seq.0", "seq.2"], **options)
    return with_random_adapters(peft.get_peft_model(Perceptron(), chosen))


def with_random_adapters(model: nn.Module) -> nn.Module:
    """As after some training: adapters start by changing nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


class Logits(nn.Module):
    """A language model with an adapter, its logits."""

    def __init__(self, config: str, **options: Any):
        super().__init__()
        import peft
        import transformers

        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0))
        chosen = getattr(peft, config)(task_type="CAUSAL_LM", **options)
        self.model = with_random_adapters(peft.get_peft_model(base, chosen))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, attention_mask=torch.ones_like(tokens)).logits


def vectors() -> tuple[torch.Tensor]:
    return (torch.randn(4, 5),)


def tokens() -> tuple[torch.Tensor]:
    return (torch.randint(VOCABULARY, (2, 6)),)


def every(x: torch.Tensor) -> bool:
    return True


LORA = {"r": 2, "modules_to_save": ["seq.4"]}
ATTENTION = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}

test_peft = zoo_test(
    "peft",
    Specimen("LoRA", lambda: adapted("LoraConfig", **LORA), vectors),
    Specimen("LoRA, dropout", lambda: adapted("LoraConfig", r=2, lora_dropout=0.3), vectors, random=True),
    Specimen("DoRA", lambda: adapted("LoraConfig", r=2, use_dora=True), vectors, smooth=False),  # it detaches a norm
    Specimen("IA3", lambda: adapted("IA3Config", feedforward_modules=["seq.2"]), vectors),
    Specimen("LoHa", lambda: adapted("LoHaConfig", r=2), vectors),
    Specimen("OFT", lambda: adapted("OFTConfig", r=1, oft_block_size=0), vectors),
    Specimen("GPT-2, LoRA", lambda: Logits("LoraConfig", **ATTENTION), tokens, maps=every),
    Specimen("GPT-2, prompt tuning", lambda: Logits("PromptTuningConfig", num_virtual_tokens=3), tokens, maps=every),
    Specimen("GPT-2, prefix tuning", lambda: Logits("PrefixTuningConfig", num_virtual_tokens=3), tokens, maps=every),
)
