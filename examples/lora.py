"""Low-rank adapters of peft in a Flax NNX training loop: a small GPT-2 that counts up learns to count down.

A GPT-2 of transformers, made from a config, is trained to continue `3 7 11 15 ...`, numbers in steps of any size. Then
peft puts adapters (LoRA) around its layers, and the same loop, of NNX and optax, trains it to count downwards:
`nnx.Param` are now the adapters alone, and not a bit of anything else changes. The first steps are compared with
torch.optim's, and what was learned is saved by peft and loaded by it into the model from before.

    python examples/lora.py --output lora.png
"""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft  # pyright: ignore[reportMissingImports]
import torch
import torchleaf
import transformers
from flax import nnx
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float, Int

NUMBERS, LENGTH, BATCH = 31, 16, 64
RATE = 3e-3
"""The learning rate at first; it falls to zero along a cosine."""

Tokens = Int[Array, f"{BATCH} {LENGTH}"]


def make_gpt2() -> torch.nn.Module:
    """A small one, with random weights."""
    config = transformers.GPT2Config(
        vocab_size=NUMBERS,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def with_adapters(network: torch.nn.Module) -> peft.PeftModel:
    """A copy of the network, frozen, with adapters that change nothing yet."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    return peft.get_peft_model(copy.deepcopy(network), config)


def counting(key: Array, sign: int) -> Tokens:
    """Numbers upwards or downwards, modulo `NUMBERS`, each row from another start in steps of another size."""
    start, size = jax.random.randint(key, (2, BATCH, 1), 1, NUMBERS // 2)
    return (start + sign * size * jnp.arange(LENGTH)) % NUMBERS


def loss_fn(model: nnx.Module, tokens: Tokens) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the next numbers, from the third on, and how many of them are right."""
    logits, labels = model(tokens).logits[:, 1:-1], tokens[:, 2:]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(logits.argmax(-1) == labels)


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, tokens: Tokens) -> tuple[Array, Array]:
    """One of training, in place; loss and accuracy before it."""
    (loss, accuracy), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens)
    optimizer.update(model, grads)
    return loss, accuracy


def train(model: nnx.Module, batches: Sequence[Tokens], name: str) -> np.ndarray:
    """Train whatever is an `nnx.Param`; losses and accuracies."""
    rate = optax.cosine_decay_schedule(RATE, len(batches))
    optimizer, history = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param), []
    for tokens, bar in progress(batches, name):
        loss, accuracy = step(model, optimizer, tokens)
        history.append((float(loss), float(accuracy)))
        bar.set_postfix(loss=f"{history[-1][0]:.2f}", accuracy=f"{history[-1][1]:.0%}")
    return np.array(history)


def train_in_torch(network: torch.nn.Module, batches: Sequence[Tokens], steps: int) -> np.ndarray:
    """The first steps of the same in torch alone; losses."""
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), RATE)
    schedule, losses = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches)), []
    for tokens in map(torchleaf.to_torch, batches[:steps]):
        logits, labels = network(tokens).logits[:, 1:-1], tokens[:, 2:].long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


def main() -> None:
    """Train, adapt, compare, save and load, draw."""
    arguments = parse_arguments(__doc__, "lora.png")
    torch.manual_seed(arguments.seed)
    steps = 60 if arguments.quick else 2000
    keys = jax.random.split(jax.random.key(arguments.seed), 2 * steps + 1)
    up, down = ([counting(key, sign) for key in part] for sign, part in ((1, keys[:steps]), (-1, keys[steps:-1])))

    base = torchleaf.nnx.TorchModule(make_gpt2())
    before = train(base, up, "counting up")
    network = with_adapters(torchleaf.to_torch_module(base))
    losses = train_in_torch(copy.deepcopy(network), down, 5)
    model = torchleaf.nnx.TorchModule(network, copy=True)
    after = train(model, down, "adapters, counting down")
    check("losses of 5 steps, optax and torch.optim", np.abs(after[:5, 0] / losses - 1).max(), 1e-3)

    trained, frozen = [], []
    tuned: Any = torchleaf.to_torch_module(model)  # peft's
    for (name, new), old in zip(tuned.named_parameters(), network.parameters(), strict=True):
        (trained if "lora" in name else frozen).append(torch.equal(new, old))
    check("frozen weights that changed", float(len(frozen) - sum(frozen)), 0.0)
    check("adapters that did not", float(sum(trained)), 0.0)

    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(torchleaf.to_torch_module(base), folder)
    held_out = {name: counting(keys[-1], sign) for name, sign in (("up", 1), ("down", -1))}
    with torch.no_grad():
        expected = loaded(torchleaf.to_torch(held_out["down"])).logits.numpy()
    check(
        "logits, adapters in NNX and loaded by peft",
        float(jnp.abs(model(held_out["down"]).logits - expected).max()),
        1e-4,
    )
    accuracy = {
        who: [float(loss_fn(m, x)[1]) for x in held_out.values()] for who, m in (("base", base), ("adapted", model))
    }
    if not arguments.quick:
        check("numbers upwards that the base gets wrong", 1 - accuracy["base"][0], 0.05)
        check("numbers downwards that the adapted gets wrong", 1 - accuracy["adapted"][1], 0.05)

    picture, (curves, bars) = figure(2)
    curves.plot(
        np.concatenate([before[:, 0], np.full(steps, np.nan)]), color=DARK, linewidth=1, label="all weights, up"
    )
    curves.plot(np.arange(steps, 2 * steps), after[:, 0], color=RED, linewidth=1, label="adapters, down")
    curves.set(title="Loss", xlabel="step", yscale="log")
    curves.legend(frameon=False)
    for i, (who, color) in enumerate({"base": LIGHT, "adapted": RED}.items()):
        bars.bar(np.arange(2) + 0.4 * i, accuracy[who], 0.38, color=color, label=who)
    bars.set(
        title="Numbers that are right, in new rows", xticks=[0.2, 1.2], xticklabels=["counting up", "counting down"]
    )
    bars.legend(frameon=False)
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
