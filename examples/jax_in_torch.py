"""Train a torch classifier whose middle is a neural ODE of JAX on handwritten digits, and check it against pure JAX.

The classifier is a `torch.nn.Module`, trained by `torch.optim.AdamW`. Between its convolutions and its last layer,
features flow along a learned vector field for one unit of time: an Equinox module, solved by diffrax with steps as
small as they have to be. It is a `torchleaf.JaxModule`, so its weights are torch parameters, and gradients go through
the solver. The same training then runs in JAX alone, from the same weights and on the same batches, and the two must
give the same loss at every step.

    python examples/jax_in_torch.py --epochs 20 --output jax_in_torch.png
"""

import time

import diffrax
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
from jaxtyping import Array, Float, Int, PyTree

FEATURES = 32
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.05


# The JAX part.


class Flow(eqx.Module):
    """Where features are after one unit of time, each example with steps of its own size."""

    field: eqx.nn.MLP

    def __init__(self, key: Array):
        self.field = eqx.nn.MLP(FEATURES + 1, FEATURES, width_size=64, depth=1, activation=jnp.tanh, key=key)

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
        """The features of a batch at time 1."""
        return jax.vmap(self.solve)(features)

    def solve(self, features: Float[Array, " features"]) -> Float[Array, " features"]:
        """The features of one example at time 1."""
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: self.field(jnp.append(y, t))),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.2,
            y0=features,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
        )
        assert solution.ys is not None
        return solution.ys[0]


# The torch model around it.


def make_classifier(flow: Flow) -> torch.nn.Sequential:
    """Ten logits for each image of a batch."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, stride=2, padding=2),
        torch.nn.SiLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(256, FEATURES),
        torchleaf.JaxModule(flow),
        torch.nn.Linear(FEATURES, 10),
    )


# The same in JAX alone.

Weights = dict[str, Float[Array, "..."]]


def logits(model: tuple[Weights, Flow], images: Float[Array, "batch 1 8 8"]) -> Float[Array, "batch 10"]:
    """The classifier, written in JAX; of torch's layers it has the weights."""
    weights, flow = model

    def conv(name: str, x: Array, stride: int, padding: int) -> Array:
        y = jax.lax.conv_general_dilated(x, weights[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
        return y + weights[f"{name}.bias"][:, None, None]

    def linear(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = jax.nn.silu(conv("0", images, stride=2, padding=2))
    x = jax.nn.silu(conv("2", x, stride=1, padding=1))
    return linear("7", flow(linear("5", x.reshape(len(x), -1))))


def make_jax_twin(classifier: torch.nn.Sequential) -> tuple[Weights, Flow]:
    """What `logits` takes, with copies of the classifier's weights."""
    flow = torchleaf.to_jax_model(classifier[6])
    weights = {name: x for name, x in classifier.state_dict().items() if not name.startswith("6.")}
    return torchleaf.to_jax(weights, copy=True), flow


def train_twin(model: PyTree, epochs: list[Epoch], test: Digits, schedule: optax.Schedule) -> History:
    """Train in JAX alone, with optax's AdamW."""
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params: PyTree, images: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        scores = logits(eqx.combine(params, static), images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(state, images, labels):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def accuracy(state, images, labels):
        return jnp.mean(jnp.argmax(logits(eqx.combine(state[0], static), images), axis=-1) == labels)

    return train_jax((params, optimizer.init(params)), step, accuracy, epochs, test, "pure JAX")


def main() -> None:
    """Train both, compare, plot, and print a summary."""
    start = time.perf_counter()
    arguments = parse_arguments("Train a torch classifier around a neural ODE of JAX.", "jax_in_torch.png")
    train, test = load_data(arguments.seed)
    epochs = make_epochs(train, arguments.epochs, arguments.batch_size, arguments.seed)
    steps = sum(map(len, epochs))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=steps // 10, decay_steps=steps)

    torch.manual_seed(arguments.seed)
    classifier = make_classifier(Flow(jax.random.key(arguments.seed)))
    twin = make_jax_twin(classifier)
    ours = train_torch(classifier, epochs, test, schedule, WEIGHT_DECAY, name="torchleaf")
    theirs = train_twin(twin, epochs, test, schedule)
    differences = compare(ours, theirs, other="pure JAX")
    label = "neural ODE in torch, torch.optim"
    plot(ours, theirs, differences, arguments.output, label, "Loss difference", other="pure JAX")
    print_summary(ours, theirs, differences, time.perf_counter() - start, arguments.output, other="pure JAX")


if __name__ == "__main__":
    main()
