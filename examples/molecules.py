"""Molecular dynamics: an equivariant torch potential, learned on the spot, drives clusters of atoms in JAX.

The potential is a small network of e3nn's, a `torch.nn.Module`. It learns energies and forces of seven Lennard-Jones
atoms, in reduced units; the forces are its `jax.grad`, so training differentiates twice. A velocity Verlet integrator
in `jax.lax.scan` then moves many replicas at once by `jax.vmap`, and `jax.hessian` has the normal modes. Forces and
Hessian are compared with those of torch.autograd, and what comes out with Lennard-Jones itself.

    python examples/molecules.py --output molecules.png
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float

torch.serialization.add_safe_globals([slice])  # which the constants hold that e3nn 0.4 loads when it is imported
import e3nn  # noqa: E402 # pyright: ignore[reportMissingImports]
from e3nn import o3  # noqa: E402 # pyright: ignore[reportMissingImports]

e3nn.set_optimization_defaults(jit_script_fx=False)  # TorchScript, which brings nothing here

ATOMS, STEP, TEMPERATURE = 7, 0.005, 0.08
SENDERS, RECEIVERS = np.nonzero(~np.eye(ATOMS, dtype=bool))

Atoms = Float[Array, "atoms 3"]
Energy = Callable[[Atoms], Float[Array, ""]]


def perceptron(inputs: int, outputs: int) -> torch.nn.Sequential:
    """A small network."""
    return torch.nn.Sequential(torch.nn.Linear(inputs, 16), torch.nn.SiLU(), torch.nn.Linear(16, outputs))


class Potential(torch.nn.Module):
    """Two rounds of messages between all pairs of atoms, which are scalars and vectors; then a sum of scalars.

    Source: Batzner et al., "E(3)-equivariant graph neural networks for interatomic potentials" (2022).
    """

    senders: torch.Tensor
    receivers: torch.Tensor
    centres: torch.Tensor

    def __init__(self, lowest: float, radials: int = 8):
        super().__init__()
        self.register_buffer("senders", torch.from_numpy(SENDERS))
        self.register_buffer("receivers", torch.from_numpy(RECEIVERS))
        self.register_buffer("centres", torch.linspace(0.9, 2.2, radials))
        kinds = ["1x0e", "8x0e + 4x1o", "8x0e"]
        products: list[Any] = [
            o3.FullyConnectedTensorProduct(before, "1x0e + 1x1o", after, shared_weights=False)
            for before, after in pairwise(kinds)
        ]
        self.products = torch.nn.ModuleList(products)
        self.weights = torch.nn.ModuleList(perceptron(radials, product.weight_numel) for product in products)
        self.readout, self.lowest = perceptron(8, 1), lowest

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """`positions: [atoms, 3]`; returns the energy."""
        edges = positions[self.receivers] - positions[self.senders]
        distances = edges.norm(dim=-1, keepdim=True)
        radials = torch.exp(-(((distances - self.centres) / 0.25) ** 2)) + 1 / distances**6
        harmonics = o3.spherical_harmonics("1x0e + 1x1o", edges, normalize=True, normalization="component")
        atoms = positions.new_ones(ATOMS, 1)
        for product, weights in zip(self.products, self.weights, strict=True):
            messages = product(atoms[self.senders], harmonics, weights(radials))
            atoms = messages.new_zeros(ATOMS, messages.shape[-1]).index_add(0, self.receivers, messages) / ATOMS**0.5
        return self.readout(atoms).sum() + self.lowest


def lennard_jones(positions: Atoms) -> Float[Array, ""]:
    """The energy that is to be learned."""
    squares = jnp.sum((positions[RECEIVERS] - positions[SENDERS]) ** 2, -1)
    return 2 * jnp.sum(squares**-6 - squares**-3)  # each pair is there twice


@eqx.filter_jit
def relax(energy: Energy, positions: Atoms) -> Atoms:
    """A minimum of the energy, downhill."""
    return jax.lax.fori_loop(0, 3000, lambda _, x: x - 2e-3 * jax.grad(energy)(x), positions)


@eqx.filter_jit
def derivatives(energy: Energy, positions: Atoms) -> tuple[Atoms, Float[Array, "atoms 3 atoms 3"]]:
    """Gradient and Hessian of the energy."""
    return jax.grad(energy)(positions), jax.hessian(energy)(positions)


def frequencies(energy: Energy, start: Atoms) -> Float[Array, " modes"]:
    """Those of the normal modes at a minimum, without translations and rotations."""
    _, hessian = derivatives(energy, relax(energy, start))
    return jnp.sqrt(jnp.abs(jnp.linalg.eigvalsh(hessian.reshape(3 * ATOMS, 3 * ATOMS))[6:]))


@eqx.filter_jit
def simulate(energy: Energy, start: Atoms, key: Array, length: int) -> tuple[Float[Array, "times atoms 3"], Array]:
    """Positions and total energies by velocity Verlet, from thermal velocities."""
    value_and_slope = jax.value_and_grad(energy)
    velocities = jnp.sqrt(2 * TEMPERATURE) * jax.random.normal(key, start.shape)  # half of it becomes potential energy

    def step(state, _):
        positions, velocities, slope = state
        velocities = velocities - STEP / 2 * slope
        positions = positions + STEP * velocities
        value, slope = value_and_slope(positions)
        velocities = velocities - STEP / 2 * slope
        return (positions, velocities, slope), (positions, value + jnp.sum(velocities**2) / 2)

    state = (start, velocities - velocities.mean(0), value_and_slope(start)[1])
    return jax.lax.scan(step, state, None, length=length)[1]


def distances(positions: Float[Array, "... atoms 3"]) -> np.ndarray:
    """Those of all pairs."""
    return np.linalg.norm(np.asarray(positions[..., RECEIVERS, :] - positions[..., SENDERS, :]), axis=-1)


def train(model: torchleaf.TorchModule, data: Float[Array, "n atoms 3"], steps: int) -> Energy:
    """The trained energy."""
    params, static = eqx.partition(model, torchleaf.trainable(model))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    wanted = jax.vmap(jax.value_and_grad(lennard_jones))

    def loss_fn(params, positions) -> Float[Array, ""]:
        found = jax.vmap(jax.value_and_grad(eqx.combine(params, static)))(positions)
        energies, forces = (jnp.mean((x - y) ** 2) for x, y in zip(found, wanted(positions), strict=True))
        return energies / ATOMS + forces

    @jax.jit
    def step(params, opt_state, key):
        positions = jax.random.choice(key, data, (32,))
        loss, grads = jax.value_and_grad(loss_fn)(params, positions)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    for i, bar in progress(range(steps), "training"):
        params, opt_state, loss = step(params, opt_state, jax.random.fold_in(jax.random.key(0), i))
        bar.set_postfix(loss=f"{float(loss):.1e}")
    return eqx.combine(params, static)


def compare(model: torchleaf.TorchModule, positions: Atoms) -> None:
    """Forces and Hessian of the same module, by JAX and by torch.autograd."""
    network, given = torchleaf.to_torch_module(model), torchleaf.to_torch(positions, copy=True)
    expected = [f(network, given) for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)]
    for name, ours, theirs in zip(("forces", "Hessian"), derivatives(model, positions), expected, strict=True):
        assert isinstance(theirs, torch.Tensor)
        error = float(jnp.abs(ours - theirs.numpy()).max())
        check(f"{name}, JAX and torch.autograd", error / theirs.abs().max().item(), 1e-4)


def main() -> None:
    """Simulate, learn, simulate with what was learned, draw."""
    arguments = parse_arguments(__doc__, "molecules.png")
    torch.manual_seed(arguments.seed)
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    steps, n, length = (60, 4, 400) if arguments.quick else (6000, 32, 4000)

    angles = 2 * jnp.pi * jnp.arange(5) / 5
    ring = 0.95 * jnp.stack([jnp.cos(angles), jnp.sin(angles), 0 * angles], -1)
    minimum = relax(lennard_jones, jnp.concatenate([ring, jnp.asarray([[0, 0, 0.6], [0, 0, -0.6]])]))
    run = jax.vmap(partial(simulate, lennard_jones, minimum, length=2000))
    data = run(jax.random.split(keys[0], 32))[0][:, ::10].reshape(-1, ATOMS, 3)

    model = torchleaf.TorchModule(Potential(lennard_jones(minimum).item()), engine="xla")
    compare(model, data[-1])
    energy = train(model, data, steps)
    rotation = jnp.linalg.qr(jax.random.normal(keys[1], (3, 3)))[0]
    turned, straight = (derivatives(energy, positions)[0] for positions in (data[-1] @ rotation, data[-1]))
    check("forces turn with the atoms", float(jnp.abs(turned - straight @ rotation).max()), 1e-3)

    found, expected = (frequencies(e, minimum) for e in (energy, lennard_jones))
    error = float(jnp.mean(jnp.abs(found / expected - 1)))
    check("frequencies of the modes, mean error", error, 0.5 if arguments.quick else 0.02)

    replicas = jax.random.split(keys[2], n)
    runs = [jax.vmap(partial(simulate, e, minimum, length=length))(replicas) for e in (energy, lennard_jones)]
    (positions, energies), (reference, _) = runs
    check("drift of the total energy", float(jnp.abs(energies - energies[:, :1]).max()), 0.05)
    bins = np.linspace(0.9, 2.6, 69)
    densities = [np.histogram(distances(x), bins, density=True)[0] for x in (positions, reference)]
    error = float(np.abs(densities[0] - densities[1]).sum() * (bins[1] - bins[0]) / 2)
    check("densities of distances between atoms, difference", error, 0.5 if arguments.quick else 0.05)

    picture, (energy_panel, modes, pairs) = figure(3)
    energy_panel.plot(STEP * np.arange(length), np.asarray(energies[:8]).T, linewidth=0.6, color=DARK)
    energy_panel.set(title="Total energy of replicas", xlabel="time")
    modes.plot(expected, expected, color=LIGHT)
    modes.plot(expected, found, ".", color=RED)
    modes.set(title="Frequencies of normal modes", xlabel="Lennard-Jones", ylabel="torch, jax.hessian")
    pairs.stairs(densities[1], bins, fill=True, color=LIGHT, label="Lennard-Jones")
    pairs.stairs(densities[0], bins, color=RED, label="torch")
    pairs.set(title="Distances between atoms, density", xlabel="distance")
    pairs.legend(frameon=False)
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
