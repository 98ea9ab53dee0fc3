"""Train torch layers with BatchNorm and Dropout in a Flax NNX model, and check it against pure torch.

The convolutions are a `torch.nn.Module`, wrapped by `torchleaf.nnx.TorchModule`; next to them stands NNX's own
`Linear`. Everything around them is what Flax users have: images with channels last, `rngs`, `model.train()` and
`model.eval()`, `nnx.Optimizer`, `nnx.jit`; the running statistics are updated in place.

    python examples/nnx_digits.py --epochs 20 --output nnx_digits.png
"""

import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from digits import Digits, Epoch, History, train_torch
from digits_cnn import CHANNELS, WEIGHT_DECAY, for_flax, make_cnn, make_torch_twin, run_example
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm


class Classifier(nnx.Module):
    """Ten logits for each image."""

    def __init__(self, cnn: torch.nn.Module, rngs: nnx.Rngs):
        """The torch layers have torch's weights, `head` gets its own from `rngs`; dropout draws from `rngs`."""
        self.encoder = torchleaf.nnx.TorchModule(cnn, rngs=rngs, channels_last=True)
        self.head = nnx.Linear(CHANNELS, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        """Classify a batch of images."""
        return self.head(self.encoder(images).mean(axis=(1, 2)))


def loss_fn(model: Classifier, images: Float[Array, "batch 8 8 1"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(
    model: Classifier, optimizer: nnx.Optimizer, images: Float[Array, "batch 8 8 1"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """One step of the optimizer; parameters, statistics and the count of keys are updated in place."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model: Classifier, images: Float[Array, "n 8 8 1"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """The fraction of images classified correctly."""
    return jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def train_nnx(model: Classifier, epochs: list[Epoch], test: Digits, schedule: optax.Schedule) -> History:
    """Train torch's layers and NNX's together."""
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)
    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc="torchleaf", unit="epoch")):
        model.train()  # batch statistics, dropout
        for batch in batches:
            losses.append(train_step(model, optimizer, *for_flax(batch)))
        model.eval()  # running statistics, no dropout
        accuracies.append(accuracy(model, *for_flax(test)))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


def train_both(
    dropout: float, seed: int, epochs: list[Epoch], test: Digits, schedule: optax.Schedule
) -> tuple[History, History]:
    """The same training in an NNX model and in torch alone."""
    torch.manual_seed(seed)
    model = Classifier(make_cnn(dropout), nnx.Rngs(params=seed, dropout=seed + 1))
    cnn = torchleaf.to_torch_module(model.encoder)
    twin = make_torch_twin(cnn, model.head.kernel[...], jnp.asarray(model.head.bias))
    return train_nnx(model, epochs, test, schedule), train_torch(twin, epochs, test, schedule, WEIGHT_DECAY)


if __name__ == "__main__":
    run_example(
        "Train torch layers in an NNX model on handwritten digits.",
        "nnx_digits.png",
        "torch CNN in NNX, optax",
        train_both,
    )
