"""Train a torch convolutional encoder under a JAX head on handwritten digits, and check it against pure torch.

The model is an Equinox module. Its encoder is a `torch.nn.Module` whose parameters are leaves, so optax updates them
together with the JAX head's, under one `eqx.filter_jit`, with `jax.vmap` over single images. The same training then
runs in torch alone, from the same weights and on the same batches, and the two must give the same loss at every step.

    python examples/train_digits.py --epochs 20 --output digits.png
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import torch
import torchleaf
from digits import (
    Digits,
    Epoch,
    History,
    compare,
    load_data,
    make_epochs,
    parse_arguments,
    plot,
    print_summary,
    train_jax,
    train_torch,
)
from jaxtyping import Array, Float, Int

FEATURES = 512
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.2


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


def train_classifier(model: Classifier, epochs: list[Epoch], test: Digits, schedule: optax.Schedule) -> History:
    """Train encoder and head together with optax."""
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    # The optimizer gets trainable leaves only: weight decay would change buffers and frozen parameters too.
    params, static = eqx.partition(model, torchleaf.trainable(model))

    @eqx.filter_jit
    def step(state, images, labels):
        params, opt_state = state
        loss, grads = eqx.filter_value_and_grad(loss_fn)(params, static, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state), loss

    @eqx.filter_jit
    def accuracy(state, images, labels):
        logits = jax.vmap(eqx.combine(state[0], static))(images)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    return train_jax((params, optimizer.init(params)), step, accuracy, epochs, test)


def main() -> None:
    """Train both, compare, plot, and print a summary."""
    start = time.perf_counter()
    arguments = parse_arguments("Train a torch encoder in an Equinox model on handwritten digits.", "digits.png")
    train, test = load_data(arguments.seed)
    epochs = make_epochs(train, arguments.epochs, arguments.batch_size, arguments.seed)
    steps = sum(map(len, epochs))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps)

    torch.manual_seed(arguments.seed)
    model = Classifier(jax.random.key(arguments.seed))
    twin = make_torch_twin(model)
    ours = train_classifier(model, epochs, test, schedule)
    theirs = train_torch(twin, epochs, test, schedule, WEIGHT_DECAY)
    differences = compare(ours, theirs)
    plot(ours, theirs, differences, arguments.output, "torch encoder in Equinox, optax", "Loss difference")
    print_summary(ours, theirs, differences, time.perf_counter() - start, arguments.output)


if __name__ == "__main__":
    main()
