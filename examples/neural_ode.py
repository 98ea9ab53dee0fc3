"""A torch vector field in diffrax: a neural ODE, fitted to a simulated predator and prey.

The field is a `torch.nn.Module`; diffrax solves it with adaptive steps, in one compiled program. optax trains it on
noisy measurements of the first half of a trajectory, and it goes on by itself into the second half. Its gradients, by
both of diffrax's adjoints (checkpoints, and solving backwards), are compared with torchdiffeq's for the same module.

    python examples/neural_ode.py --output neural_ode.png
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchdiffeq
import torchleaf
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float

TIMES = np.linspace(0.0, 10.0, 101, dtype=np.float32)
KNOWN = 51
"""How many measurements are seen in training: those of the first half."""
NOISE = 0.02
START = jnp.log(jnp.asarray([1.2, 0.6]))

Trajectory = Float[Array, "times 2"]


class Field(torch.nn.Module):
    """How fast the logarithms of two populations change."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """`y: [2]`, and so is what it returns."""
        return self.layers(y.exp())


def solve(
    field: Callable[[Any, Array], Array],
    args: Any,
    times: Float[np.ndarray, " times"] = TIMES,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Trajectory:
    """Where `dy/dt = field(args, y)` leads from `START`."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(args, y)),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=0.05,
        y0=START,
        args=args,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-6),
        adjoint=adjoint or diffrax.RecursiveCheckpointAdjoint(),
    )
    assert solution.ys is not None
    return solution.ys


def lotka_volterra(rates: Float[Array, "2"], y: Float[Array, "2"]) -> Float[Array, "2"]:
    """How fast the logarithms of prey and predator really change."""
    prey, predator = jnp.exp(y)
    return jnp.stack([rates[0] - predator, prey - rates[1]])


def train(model: torchleaf.TorchModule, measured: Trajectory, steps: int) -> tuple[torchleaf.TorchModule, np.ndarray]:
    """The model after training on what is known, and its losses."""
    params, static = eqx.partition(model, torchleaf.trainable(model))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def loss_fn(params, n: Array) -> Float[Array, ""]:
        errors = solve(lambda params, y: eqx.combine(params, static)(y), params, TIMES[:KNOWN]) - measured[:KNOWN]
        return jnp.mean(jnp.where(jnp.arange(KNOWN)[:, None] < n, errors**2, 0.0))

    @jax.jit
    def step(params, opt_state, n):
        loss, grads = jax.value_and_grad(loss_fn)(params, n)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = optimizer.init(params), []
    for i, bar in progress(range(steps), "training"):
        n = jnp.asarray(min(KNOWN, 10 + (2 * KNOWN * i) // steps))  # at first the beginning, which is easier to fit
        params, opt_state, loss = step(params, opt_state, n)
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.1e}")
    return eqx.combine(params, static), np.array(losses)


def compare_gradients(model: torchleaf.TorchModule, measured: Trajectory) -> None:
    """Gradients of a loss by all weights, by diffrax's adjoints and by torchdiffeq."""
    times = TIMES[:21]
    params, static = eqx.partition(model, torchleaf.trainable(model))

    def gradient(adjoint: diffrax.AbstractAdjoint) -> dict[str, Array]:
        def loss_fn(params) -> Float[Array, ""]:
            found = solve(lambda params, y: eqx.combine(params, static)(y), params, times, adjoint)
            return jnp.mean((found - measured[:21]) ** 2)

        return jax.jit(jax.grad(loss_fn))(params).params

    network = torchleaf.to_torch_module(model)
    start, t = torchleaf.to_torch(START, copy=True), torch.from_numpy(times)
    found = torchdiffeq.odeint(lambda t, y: network(y), start, t, rtol=1e-5, atol=1e-6, method="dopri5")
    assert isinstance(found, torch.Tensor)
    torch.mean((found - torch.from_numpy(np.array(measured[:21]))) ** 2).backward()
    expected = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
    scale = max(np.abs(g).max() for g in expected.values())
    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()):
        error = max(np.abs(g - expected[name]).max() for name, g in gradient(adjoint).items())
        check(f"gradients, {type(adjoint).__name__} and torchdiffeq", error / scale, 1e-2)


def main() -> None:
    """Measure, train, compare, draw."""
    arguments = parse_arguments(__doc__, "neural_ode.png")
    exact = solve(lotka_volterra, jnp.asarray([1.5, 1.0]))
    noise = np.random.default_rng(arguments.seed).normal(size=exact.shape)
    measured = exact + NOISE * noise.astype(np.float32)

    torch.manual_seed(arguments.seed)
    model = torchleaf.TorchModule(Field())
    compare_gradients(model, measured)
    model, losses = train(model, measured, 60 if arguments.quick else 1500)
    found = solve(lambda model, y: model(y), model)
    seen, unseen = (float(jnp.abs(found - exact)[part].mean()) for part in (slice(KNOWN), slice(KNOWN, None)))
    check("mean error of logarithms, where it was trained", seen, 0.5 if arguments.quick else 0.05)
    check("mean error of logarithms, where it was not", unseen, 2.0 if arguments.quick else 0.2)

    picture, (populations, errors) = figure(2)
    for i, (name, color) in enumerate({"prey": DARK, "predator": RED}.items()):
        populations.plot(TIMES, np.exp(exact[:, i]), color=color, linewidth=4, alpha=0.25)
        populations.plot(TIMES, np.exp(found[:, i]), color=color, linewidth=1.2, label=name)
        populations.plot(TIMES[:KNOWN], np.exp(measured[:KNOWN, i]), ".", color=color, markersize=3)
    populations.axvspan(TIMES[KNOWN], TIMES[-1], color=LIGHT, alpha=0.2, linewidth=0)
    populations.set(title="A torch field, solved by diffrax", xlabel="time (shaded: never seen)")
    populations.legend(frameon=False)
    errors.semilogy(losses, color=DARK, linewidth=1)
    errors.set(title="Training loss", xlabel="step")
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
