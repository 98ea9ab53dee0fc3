"""What the examples on handwritten digits share: the data, the training in torch alone, the comparison, the plot."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import optax
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

LOSS_TOLERANCE = 1e-3


class Digits(NamedTuple):
    """Images with values in [0, 1] and their labels."""

    images: Float[np.ndarray, "n 1 8 8"]
    labels: Int[np.ndarray, " n"]


Epoch = list[Digits]
State = TypeVar("State")


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


def train_torch(
    network: torch.nn.Module,
    epochs: list[Epoch],
    test: Digits,
    schedule: optax.Schedule,
    weight_decay: float,
    name: str = "pure torch",
) -> History:
    """Train in torch, with torch's own AdamW, on the same batches and at the same learning rates."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: np.asarray(schedule(count)).item())

    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc=name, unit="epoch")):
        network.train()
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        network.eval()
        with torch.no_grad():
            predicted = network(torch.from_numpy(test.images)).argmax(-1).numpy()
        accuracies.append(np.mean(predicted == test.labels))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


def train_jax(
    state: State,
    step: Callable[..., tuple[State, Any]],
    accuracy: Callable[..., Any],
    epochs: list[Epoch],
    test: Digits,
    name: str = "torchleaf",
) -> History:
    """Train in JAX: `step(state, images, labels)` gives the next state and the loss, `accuracy` what part is right."""
    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc=name, unit="epoch")):
        for images, labels in batches:
            state, loss = step(state, images, labels)
            losses.append(loss)
        accuracies.append(accuracy(state, *test))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


def compare(ours: History, theirs: History, other: str = "torch") -> Float[np.ndarray, " steps"]:
    """How far the two losses are apart at each step; raises if it is more than rounding."""
    differences = np.abs(ours.losses - theirs.losses)
    worst = int(np.argmax(differences))
    if not differences[worst] <= LOSS_TOLERANCE:  # so that NaN fails too
        raise RuntimeError(
            f"torchleaf and {other} disagree at step {worst}: loss {ours.losses[worst]} and {theirs.losses[worst]}, "
            f"more than {LOSS_TOLERANCE} apart."
        )
    return differences


def plot(
    ours: History,
    theirs: History,
    differences: np.ndarray,
    path: str,
    label: str,
    gap_title: str,
    other: str = "pure torch",
) -> None:
    """Losses, the difference between losses and test accuracies, as a PNG."""
    figure = Figure(figsize=(13, 4), layout=ConstrainedLayoutEngine(wspace=0.06))
    losses, gap, accuracies = figure.subplots(1, 3)
    steps, epochs = np.arange(1, len(ours.losses) + 1), np.arange(1, len(ours.accuracies) + 1)
    wide = {"color": "#9ecae1", "linewidth": 4, "label": label}
    thin = {"color": "#08306b", "linewidth": 1, "label": other}

    losses.semilogy(steps, ours.losses, **wide)
    losses.semilogy(steps, theirs.losses, **thin)
    losses.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    losses.legend(frameon=False)

    gap.semilogy(np.arange(1, len(differences) + 1), np.maximum(differences, 1e-9), color="#08306b", linewidth=1)
    gap.axhline(LOSS_TOLERANCE, color="#cb181d", linestyle="--", linewidth=1)
    gap.text(len(differences), LOSS_TOLERANCE * 1.3, "tolerance", color="#cb181d", ha="right")
    gap.set(title=gap_title, xlabel="step", ylabel="absolute, 0 drawn at 1e-9")
    gap.set_ylim(5e-10, 10 * LOSS_TOLERANCE)

    accuracies.plot(epochs, 100 * ours.accuracies, **wide)
    accuracies.plot(epochs, 100 * theirs.accuracies, **thin)
    accuracies.set(title="Test accuracy", xlabel="epoch", ylabel="correct, %")
    accuracies.legend(frameon=False, loc="lower right")

    for axes in (losses, gap, accuracies):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def print_summary(
    ours: History, theirs: History, differences: np.ndarray, seconds: float, path: str, other: str = "pure torch"
) -> None:
    """The results as a table."""
    print(f"\n{'':24}{'torchleaf':>12}{other:>12}")
    print(f"{'final training loss':24}{ours.losses[-1]:12.6f}{theirs.losses[-1]:12.6f}")
    print(f"{'test accuracy':24}{ours.accuracies[-1]:12.2%}{theirs.accuracies[-1]:12.2%}")
    print(f"{'largest loss difference':24}{differences.max():12.1e}  over {len(differences)} steps")
    print(f"{'seconds, all together':24}{seconds:12.1f}")
    print(f"{'plot':24}{path:>12}")


def parse_arguments(description: str, output: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    parser.add_argument("--output", default=output, help="where the plot goes (%(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or not 1 <= arguments.batch_size <= 1000:
        parser.error("--epochs must be at least 1, --batch-size between 1 and 1000")
    return arguments
