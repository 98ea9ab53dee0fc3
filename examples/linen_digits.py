"""Train torch layers with BatchNorm and Dropout in a Flax Linen model, and check it against pure torch.

The convolutions are a `torch.nn.Module`, wrapped by `torchleaf.linen.TorchModule`; next to them stands Linen's own
`Dense`. Everything around them is what Flax users have: images with channels last, a `TrainState` that carries
`batch_stats` and the dropout key, `mutable=["batch_stats"]`, optax, one `jax.jit`.

    python examples/linen_digits.py --epochs 20 --output linen_digits.png
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from digits import Digits, Epoch, History, train_torch
from digits_cnn import WEIGHT_DECAY, for_flax, make_cnn, make_torch_twin, run_example
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, Int
from tqdm import tqdm


class Classifier(nn.Module):
    """Ten logits for each image."""

    cnn: torch.nn.Module

    def setup(self) -> None:
        self.encoder = torchleaf.linen.TorchModule(self.cnn, channels_last=True)
        self.head = nn.Dense(10)

    def __call__(self, images: Float[Array, "batch 8 8 1"], *, train: bool) -> Float[Array, "batch 10"]:
        """Classify a batch of images."""
        return self.head(self.encoder(images, train=train).mean(axis=(1, 2)))


class State(TrainState):
    """Parameters and optimizer state, BatchNorm's statistics, and the key that dropout's masks come from."""

    batch_stats: Any
    dropout_key: Array


@jax.jit
def train_step(
    state: State, images: Float[Array, "batch 8 8 1"], labels: Int[Array, " batch"]
) -> tuple[State, Float[Array, ""]]:
    """One step of the optimizer; the statistics are updated as well."""
    key = jax.random.fold_in(state.dropout_key, state.step)

    def loss_fn(params: Any) -> tuple[Float[Array, ""], Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), loss


@jax.jit
def accuracy(state: State, images: Float[Array, "n 8 8 1"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """The fraction of images classified correctly, with the running statistics and without dropout."""
    logits = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, images, train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def train_linen(state: State, epochs: list[Epoch], test: Digits) -> History:
    """Train torch's layers and Linen's together."""
    losses, accuracies = [], []
    for batches in (progress := tqdm(epochs, desc="torchleaf", unit="epoch")):
        for batch in batches:
            state, loss = train_step(state, *for_flax(batch))
            losses.append(loss)
        accuracies.append(accuracy(state, *for_flax(test)))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", test_accuracy=f"{accuracies[-1]:.2%}")
    return History(np.array(losses), np.array(accuracies))


def train_both(
    dropout: float, seed: int, epochs: list[Epoch], test: Digits, schedule: optax.Schedule
) -> tuple[History, History]:
    """The same training in a Linen model and in torch alone."""
    torch.manual_seed(seed)
    model = Classifier(make_cnn(dropout))  # torch initialises its layers, the key Linen's
    variables: Any = model.init(jax.random.key(seed), for_flax(test)[0], train=False)
    head = variables["params"]["head"]
    twin = make_torch_twin(torchleaf.to_torch_module(model.bind(variables).encoder), head["kernel"], head["bias"])
    state = State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adamw(schedule, weight_decay=WEIGHT_DECAY),
        batch_stats=variables["batch_stats"],
        dropout_key=jax.random.key(seed + 1),
    )
    return train_linen(state, epochs, test), train_torch(twin, epochs, test, schedule, WEIGHT_DECAY)


if __name__ == "__main__":
    run_example(
        "Train torch layers in a Linen model on handwritten digits.",
        "linen_digits.png",
        "torch CNN in Linen, optax",
        train_both,
    )
