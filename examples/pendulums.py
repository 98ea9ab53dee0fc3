"""A torch policy in an environment of JAX: pendulums are swung up, by gradients through the physics.

The policy is a `torch.nn.Module`; the environment, in JAX, is run in `jax.lax.scan`, hundreds of pendulums at once by
`jax.vmap`; the cost of an episode is differentiated through all its steps, and optax improves the policy. Before that,
cost and gradients are compared with the same episodes written in torch alone.

    python examples/pendulums.py --output pendulums.png
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from gallery import DARK, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float

STEP, LENGTH = 0.05, 140
"""Seconds of a step, and how many an episode has."""
STRONGEST = 5.0
"""The torque of the motor: too little to lift the pendulum at once, whose weight pulls with 10."""


class Policy(torch.nn.Module):
    """A torque for an angle and a speed."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, width),
            torch.nn.Tanh(),
            torch.nn.Linear(width, width),
            torch.nn.Tanh(),
            torch.nn.Linear(width, 1),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """`state: [..., 2]`, the angle from the top and the speed; returns `[...]`."""
        angle, speed = state.unbind(-1)
        seen = torch.stack([angle.cos(), angle.sin(), speed / 5], -1)
        return STRONGEST * torch.tanh(self.layers(seen).squeeze(-1))


def episode(policy, start: Float[Array, "2"]) -> tuple[Float[Array, ""], Float[Array, "steps 2"]]:
    """The mean cost of one pendulum's episode, and its states."""

    def step(state, _):
        angle, speed = state
        torque = policy(state)
        speed = speed + STEP * (10 * jnp.sin(angle) + torque)
        angle = angle + STEP * speed
        cost = (1 - jnp.cos(angle)) + 0.02 * speed**2 + 0.002 * torque**2
        return jnp.stack([angle, speed]), (cost, jnp.stack([angle, speed]))

    _, (costs, states) = jax.lax.scan(step, start, None, length=LENGTH)
    return costs.mean(), states


def cost_in_torch(policy: torch.nn.Module, state: torch.Tensor, length: int) -> torch.Tensor:
    """The same in torch alone, of many pendulums."""
    costs = []
    for _ in range(length):
        angle, speed = state.unbind(-1)
        torque = policy(state)
        speed = speed + STEP * (10 * angle.sin() + torque)
        angle = angle + STEP * speed
        costs.append((1 - angle.cos()) + 0.02 * speed**2 + 0.002 * torque**2)
        state = torch.stack([angle, speed], -1)
    return torch.stack(costs).mean()


def starts(key: Array, n: int) -> Float[Array, "n 2"]:
    """Pendulums that hang, nearly, and hardly move."""
    angle, speed = jax.random.normal(key, (2, n)) * jnp.asarray([[0.3], [0.5]])
    return jnp.stack([math.pi + angle, speed], -1)


def mean_cost(policy, start: Float[Array, "n 2"]) -> Float[Array, ""]:
    """That of many episodes."""
    return jax.vmap(lambda state: episode(policy, state)[0])(start).mean()


def compare(policy: torchleaf.TorchModule, start: Float[Array, "n 2"]) -> None:
    """Cost and gradients, in JAX and in torch."""
    network = torchleaf.to_torch_module(policy)
    expected = cost_in_torch(network, torchleaf.to_torch(start), LENGTH)
    expected.backward()
    cost, grads = eqx.filter_jit(eqx.filter_value_and_grad(mean_cost))(policy, start)
    check("cost of an episode, scan in JAX and loop in torch", abs(float(cost) / expected.item() - 1), 1e-4)
    slopes = {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None}
    scale = max(np.abs(g).max() for g in slopes.values())
    error = max(np.abs(np.asarray(grads.params[name]) - g).max() for name, g in slopes.items())
    check("its gradients by the policy's weights", error / scale, 1e-2)  # chaotic: rounding grows from step to step


def main() -> None:
    """Compare, train, draw."""
    arguments = parse_arguments(__doc__, "pendulums.png")
    torch.manual_seed(arguments.seed)
    policy = torchleaf.TorchModule(Policy())
    key = jax.random.key(arguments.seed)
    compare(policy, starts(key, 16))

    n, steps = (64, 20) if arguments.quick else (500, 800)
    params, static = eqx.partition(policy, torchleaf.trainable(policy))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))

    @jax.jit
    def step(params, opt_state, key):
        cost, grads = jax.value_and_grad(lambda params: mean_cost(eqx.combine(params, static), starts(key, n)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, cost

    opt_state, costs = optimizer.init(params), []
    for i, bar in progress(range(steps), f"{n} pendulums"):
        params, opt_state, cost = step(params, opt_state, jax.random.fold_in(key, i))
        costs.append(float(cost))
        bar.set_postfix(cost=f"{costs[-1]:.2f}")
    trained = eqx.combine(params, static)

    _, states = eqx.filter_jit(jax.vmap(lambda state: episode(trained, state)))(
        starts(jax.random.fold_in(key, steps), 200)
    )
    if not arguments.quick:
        standing = float(jnp.mean(jnp.cos(states[:, -1, 0]) >= 0.9))
        check("pendulums that do not stand in the end", 1 - standing, 0.1)

    picture, (curve, angles) = figure(2)
    curve.plot(costs, color=DARK, linewidth=1)
    curve.set(title=f"Cost of {n} episodes at once", xlabel="step")
    height = np.cos(np.asarray(states[:40, :, 0])).T
    angles.plot(STEP * np.arange(LENGTH), height, color=DARK, alpha=0.25, linewidth=0.8)
    angles.axhline(1, color=RED, linestyle="--", linewidth=1)
    angles.set(title="Height of 40 pendulums", xlabel="seconds")
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
