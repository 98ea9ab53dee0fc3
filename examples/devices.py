"""Data parallel training of a torch network on many devices, by sharding its batches under `jax.jit`.

A convolutional network, a `torch.nn.Module`, learns handwritten digits on a mesh of four devices (here, parts of the
CPU): each runs torch on its part of every batch, and JAX sums the gradients in an all-reduce. The training step is the
one for a single device, compiled for other shardings. It is run on one device too, and written again in torch alone:
the losses agree, step by step.

    python examples/devices.py --output devices.png
"""

import re
from collections.abc import Iterator

import equinox as eqx
import jax
import numpy as np
import optax
import torch
import torchleaf
from digits import load_data
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

jax.config.update("jax_num_cpu_devices", 4)  # on machines with accelerators, those are the devices
BATCH, RATE = 64, 2e-3
OPTIMIZER = optax.adam(RATE)

Images = Float[Array, "n 1 8 8"]
Labels = Int[Array, " n"]


def make_network() -> torch.nn.Module:
    """Two convolutions and a linear layer."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(16, 32, 3, stride=2),
        torch.nn.GELU(),
        torch.nn.Flatten(-3),  # of one example or of many
        torch.nn.Linear(288, 10),
    )


def loss_fn(model: torchleaf.TorchModule, images: Images, labels: Labels) -> Float[Array, ""]:
    """Cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(images), labels).mean()


@eqx.filter_jit
def step(model: torchleaf.TorchModule, opt_state: optax.OptState, images: Images, labels: Labels):
    """One step of training; nothing in it knows of devices."""
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, images, labels)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss


def batches(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffled in each epoch."""

    def chosen() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            yield from rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH)

    return [(images[rows], labels[rows]) for rows in chosen()]


def train(model: torchleaf.TorchModule, data, devices: list) -> tuple[torchleaf.TorchModule, np.ndarray]:
    """The trained model, and the losses."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    model = eqx.filter_shard(model, everywhere)
    opt_state = eqx.filter_shard(OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array)), everywhere)
    compiled = step.lower(model, opt_state, *jax.device_put(data[0], split)).compile()  # pyright: ignore
    program = compiled.compiled.as_text()
    print(f"{f'all-reduces in a step on {len(devices)} devices':58}{len(re.findall(r' all-reduce', program)):12}")

    losses = []
    for batch, bar in progress(data, f"{len(devices)} devices"):
        model, opt_state, loss = step(model, opt_state, *jax.device_put(batch, split))
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model, np.array(losses)


def train_in_torch(network: torch.nn.Module, data) -> np.ndarray:
    """The same in torch alone; losses."""
    optimizer, losses = torch.optim.Adam(network.parameters(), RATE), []
    for batch, _ in progress(data, "torch alone"):
        images, labels = map(torch.from_numpy, batch)
        loss = torch.nn.functional.cross_entropy(network(images), labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def main() -> None:
    """Train thrice, compare, draw."""
    arguments = parse_arguments(__doc__, "devices.png")
    torch.manual_seed(arguments.seed)
    known, unknown = load_data(arguments.seed)
    data = batches(*known, 2 if arguments.quick else 30, arguments.seed)

    start = torchleaf.TorchModule(make_network(), copy=True)
    devices = jax.devices()
    model, losses = train(start, data, devices)
    _, alone = train(start, data, devices[:1])
    in_torch = train_in_torch(torchleaf.to_torch_module(start), data)
    first = slice(44)  # two epochs: later, rounding errors have grown
    check(f"losses, {len(devices)} devices and one", np.abs(losses - alone)[first].max(), 1e-4)
    check(f"losses, {len(devices)} devices and torch alone", np.abs(losses - in_torch)[first].max(), 1e-3)
    logits = jax.vmap(model)(unknown.images)
    check(
        "new digits that it gets wrong",
        float(np.mean(logits.argmax(-1) != unknown.labels)),
        0.2 if arguments.quick else 0.04,
    )

    picture, (curves, differences) = figure(2)
    for found, name, color, width in ((alone, "one device", LIGHT, 4), (losses, f"{len(devices)} devices", DARK, 1)):
        curves.semilogy(found, label=name, color=color, linewidth=width)
    curves.set(title="Training loss", xlabel="step")
    curves.legend(frameon=False)
    for found, name, color in ((alone, "one device", LIGHT), (in_torch, "torch alone", RED)):
        differences.semilogy(np.abs(losses - found) + 1e-9, ".", markersize=2, color=color, label=name)
    differences.set(title=f"Differences of losses from {len(devices)} devices'", xlabel="step")
    differences.legend(frameon=False)
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
