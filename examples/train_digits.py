"""Train a torch convolutional encoder under a JAX head on handwritten digits, and check it against pure torch.

The model is an Equinox module. Its encoder is a `torch.nn.Module` whose parameters are leaves, so optax updates them
together with the JAX head's, under one `eqx.filter_jit`, with `jax.vmap` over single images. The same training then
runs in torch alone, from the same weights and on the same batches, and the two must give the same loss at every step.

    python examples/train_digits.py --epochs 20 --output digits.png
"""

import argparse
import time
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

FEATURES = 512
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.2
LOSS_TOLERANCE = 1e-3


# Data.


class Digits(NamedTuple):
    """Images with values in [0, 1] and their labels."""

    images: Float[np.ndarray, "n 1 8 8"]
    labels: Int[np.ndarray, " n"]


Epoch = list[Digits]


class History(NamedTuple):
    """Training loss at every step, test accuracy after every epoch."""

    losses: Float[np.ndarray, " steps"]
    accuracies: Float[np.ndarray, " epochs"]


def load_data(seed: int) -> tuple[Digits, Digits]:
    """scikit-learn's 1797 digits: four fifths for training, one fifth for testing."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = map(np.asarray, split)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def make_epochs(train: Digits, epochs: int, batch_size: int, seed: int) -> list[Epoch]:
    """Shuffled batches for every epoch, each shifted sideways by up to a pixel; an incomplete last one is left out."""
    rng = np.random.default_rng(seed)

    def batch(chosen: np.ndarray) -> Digits:
        return Digits(np.roll(train.images[chosen], rng.integers(-1, 2), axis=-1), train.labels[chosen])

    per_epoch = len(train.labels) // batch_size
    orders = [rng.permutation(len(train.labels))[: per_epoch * batch_size] for _ in range(epochs)]
    return [[batch(chosen) for chosen in np.split(order, per_epoch)] for order in orders]


# The model: torch below, JAX above.


def make_encoder() -> torch.nn.Module:
    """A small torch CNN from `(1, 8, 8)`, batched or not, to `FEATURES` numbers."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 5, padding=2),
        torch.nn.SiLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(start_dim=-3),
    )


class Classifier(eqx.Module):
    """Ten logits for one image."""

    encoder: torchleaf.TorchModule
    head: eqx.nn.MLP

    def __init__(self, key: Array):
        """The torch encoder is initialised by torch, the head from `key`."""
        self.encoder = torchleaf.TorchModule(make_encoder())
        self.head = eqx.nn.MLP(FEATURES, 10, width_size=64, depth=1, activation=jax.nn.silu, key=key)

    def __call__(self, image: Float[Array, "1 8 8"]) -> Float[Array, "10"]:
        """Classify one image."""
        return self.head(self.encoder(image))


def make_torch_twin(model: Classifier) -> torch.nn.Module:
    """The same network in torch alone, with copies of the current weights."""
    hidden, last = torch.nn.Linear(FEATURES, 64), torch.nn.Linear(64, 10)
    for linear, layer in zip((hidden, last), model.head.layers, strict=True):
        linear.load_state_dict(torchleaf.to_torch({"weight": layer.weight, "bias": layer.bias}))
    return torch.nn.Sequential(torchleaf.to_torch_module(model.encoder), hidden, torch.nn.SiLU(), last)


# Training in JAX.


def loss_fn(
    params: Classifier, static: Classifier, images: Float[Array, "batch 1 8 8"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy; the model sees one image at a time."""
    model = eqx.combine(params, static)
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def accuracy(model: Classifier, images: Float[Array, "n 1 8 8"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """The fraction of images classified correctly."""
    return jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=-1) == labels)


def train_jax(model: Classifier, epochs: list[Epoch], test: Digits, schedule: optax.Schedule) -> History:
    """Train encoder and head together with optax."""
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    # The optimizer gets trainable leaves only: weight decay would change buffers and frozen parameters too.
    params, static = eqx.partition(model, torchleaf.trainable(model))
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, static, opt_state, images, labels):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(params, static, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, loss

    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc="torchleaf", unit="epoch")):
        for images, labels in batches:
            params, opt_state, loss = step(params, static, opt_state, images, labels)
            losses.append(loss)
        accuracies.append(accuracy(eqx.combine(params, static), *map(jnp.asarray, test)))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


# The same training in torch.


def train_torch(network: torch.nn.Module, epochs: list[Epoch], test: Digits, schedule: optax.Schedule) -> History:
    """Train the torch twin with torch's own AdamW and the same learning rates."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: np.asarray(schedule(count)).item())

    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc="pure torch", unit="epoch")):
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        with torch.no_grad():
            predicted = network(torch.from_numpy(test.images)).argmax(-1).numpy()
        accuracies.append(np.mean(predicted == test.labels))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


# Results.


def compare(ours: History, theirs: History) -> Float[np.ndarray, " steps"]:
    """How far the two losses are apart at each step; raises if it is more than rounding."""
    differences = np.abs(ours.losses - theirs.losses)
    worst = int(np.argmax(differences))
    if not differences[worst] <= LOSS_TOLERANCE:  # so that NaN fails too
        raise RuntimeError(
            f"torchleaf and torch disagree at step {worst}: loss {ours.losses[worst]} and {theirs.losses[worst]}, "
            f"more than {LOSS_TOLERANCE} apart."
        )
    return differences


def plot(ours: History, theirs: History, differences: np.ndarray, path: str) -> None:
    """Losses, their difference and test accuracies, as a PNG."""
    figure = Figure(figsize=(13, 4), layout=ConstrainedLayoutEngine(wspace=0.06))
    losses, gap, accuracies = figure.subplots(1, 3)
    steps, epochs = np.arange(1, len(ours.losses) + 1), np.arange(1, len(ours.accuracies) + 1)
    wide = {"color": "#9ecae1", "linewidth": 4, "label": "torch encoder in Equinox, optax"}
    thin = {"color": "#08306b", "linewidth": 1, "label": "pure torch"}

    losses.semilogy(steps, ours.losses, **wide)
    losses.semilogy(steps, theirs.losses, **thin)
    losses.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    losses.legend(frameon=False)

    gap.semilogy(steps, np.maximum(differences, 1e-9), color="#08306b", linewidth=1)
    gap.axhline(LOSS_TOLERANCE, color="#cb181d", linestyle="--", linewidth=1)
    gap.text(steps[-1], LOSS_TOLERANCE * 1.3, "tolerance", color="#cb181d", ha="right")
    gap.set(title="Difference between the losses", xlabel="step", ylabel="absolute, 0 drawn at 1e-9")
    gap.set_ylim(5e-10, 10 * LOSS_TOLERANCE)

    accuracies.plot(epochs, 100 * ours.accuracies, **wide)
    accuracies.plot(epochs, 100 * theirs.accuracies, **thin)
    accuracies.set(title="Test accuracy", xlabel="epoch", ylabel="correct, %")
    accuracies.legend(frameon=False, loc="lower right")

    for axes in (losses, gap, accuracies):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a torch encoder in an Equinox model on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    parser.add_argument("--output", default="digits.png", help="where the plot goes (%(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or not 1 <= arguments.batch_size <= 1000:
        parser.error("--epochs must be at least 1, --batch-size between 1 and 1000")
    return arguments


def main() -> None:
    """Train both, compare, plot, and print a summary."""
    start = time.perf_counter()
    arguments = parse_arguments()
    train, test = load_data(arguments.seed)
    epochs = make_epochs(train, arguments.epochs, arguments.batch_size, arguments.seed)
    steps = sum(map(len, epochs))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps)

    torch.manual_seed(arguments.seed)
    model = Classifier(jax.random.key(arguments.seed))
    twin = make_torch_twin(model)
    ours = train_jax(model, epochs, test, schedule)
    theirs = train_torch(twin, epochs, test, schedule)
    differences = compare(ours, theirs)
    plot(ours, theirs, differences, arguments.output)

    print(f"\n{'':24}{'torchleaf':>12}{'pure torch':>12}")
    print(f"{'final training loss':24}{ours.losses[-1]:12.6f}{theirs.losses[-1]:12.6f}")
    print(f"{'test accuracy':24}{ours.accuracies[-1]:12.2%}{theirs.accuracies[-1]:12.2%}")
    print(f"{'largest loss difference':24}{differences.max():12.1e}  over {steps} steps")
    print(f"{'seconds, all together':24}{time.perf_counter() - start:12.1f}")
    print(f"{'plot':24}{arguments.output:>12}")


if __name__ == "__main__":
    main()
