"""What the Linen and the NNX example share: the torch network with BatchNorm and Dropout, and the two comparisons.

Without dropout the losses of the two trainings must be equal at every step. With it they cannot be, because JAX's keys
and torch's generator give other masks: there both must reach the same test accuracy.
"""

import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from digits import Digits, Epoch, History, compare, load_data, make_epochs, parse_arguments, plot, print_summary
from jaxtyping import Array, Float, Int

CHANNELS = 64
DROPOUT = 0.2
LEARNING_RATE = 1e-2
STEADY_RATE = 1e-3  # for the comparison of losses: at large rates Adam and BatchNorm amplify rounding at every step
WEIGHT_DECAY = 0.2
ACCURACY_TOLERANCE = 0.025  # nine of the 360 test images

TrainBoth = Callable[[float, int, list[Epoch], Digits, optax.Schedule], tuple[History, History]]
"""Trains with `(dropout, seed, epochs, test, schedule)`, with torchleaf and in torch alone."""


def make_cnn(dropout: float) -> torch.nn.Module:
    """A torch CNN with BatchNorm and dropout, from a batch of `(1, 8, 8)` to `(CHANNELS, 4, 4)`."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, CHANNELS, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(CHANNELS),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Dropout(dropout),
    )


def make_torch_twin(cnn: torch.nn.Module, kernel: Float[Array, "64 10"], bias: Float[Array, "10"]) -> torch.nn.Module:
    """The same classifier in torch alone: the CNN, the mean over the image, and a Flax dense layer's weights."""
    head = torch.nn.Linear(CHANNELS, 10)
    head.load_state_dict(torchleaf.to_torch({"weight": kernel.T, "bias": bias}))
    return torch.nn.Sequential(cnn, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)


def check_accuracies(ours: History, theirs: History) -> None:
    """Raises if one of the two has learnt less than the other."""
    best, best_torch = ours.accuracies.max(), theirs.accuracies.max()
    if not abs(best - best_torch) <= ACCURACY_TOLERANCE:
        raise RuntimeError(f"torchleaf reaches {best:.2%}, torch {best_torch:.2%}: not the same within a few images.")


def run_example(description: str, output: str, label: str, train_both: TrainBoth) -> None:
    """An epoch without dropout, the losses compared; then all epochs with it, the accuracies compared."""
    start = time.perf_counter()
    arguments = parse_arguments(description, output)
    train, test = load_data(arguments.seed)
    epochs = make_epochs(train, arguments.epochs, arguments.batch_size, arguments.seed)
    steps = sum(map(len, epochs))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps)

    print("an epoch without dropout")
    differences = compare(*train_both(0.0, arguments.seed, epochs[:1], test, optax.constant_schedule(STEADY_RATE)))
    print("all epochs with dropout")
    ours, theirs = train_both(DROPOUT, arguments.seed, epochs, test, schedule)
    check_accuracies(ours, theirs)
    plot(ours, theirs, differences, arguments.output, label, "Loss difference without dropout")
    print_summary(ours, theirs, differences, time.perf_counter() - start, arguments.output)


def for_flax(batch: Digits) -> tuple[Float[Array, "n 8 8 1"], Int[Array, " n"]]:
    """Images with channels last, as Flax has them, and labels."""
    return jnp.asarray(np.moveaxis(batch.images, 1, -1)), jnp.asarray(batch.labels)
