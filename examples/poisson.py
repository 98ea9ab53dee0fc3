"""A physics-informed network: a torch SIREN that solves Poisson's equation, with derivatives of it by JAX.

`-(u_xx + u_yy) = f` on the unit square, with `u = 0` on its edge. The network is a `torch.nn.Module` of sines; its
Laplacian is the trace of `jax.hessian`, under `jax.vmap` over points, and the loss is differentiated once more, by the
weights. optax's Adam starts, its L-BFGS finishes. The solution is known, so the error is, too; and before training the
Laplacian is compared with the one that torch.autograd gives, point by point.

    python examples/poisson.py --output poisson.png
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from gallery import DARK, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float

WIDTH, FREQUENCY = 32, 6.0


class Siren(torch.nn.Module):
    """A network of sines, times a polynomial that is zero on the edge.

    Source: Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions" (2020).
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.last = torch.nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.first.weight.uniform_(-1 / 2, 1 / 2)
            for layer in (self.second, self.last):
                bound = (6 / WIDTH) ** 0.5 / FREQUENCY
                layer.weight.uniform_(-bound, bound)

    def forward(self, point: torch.Tensor) -> torch.Tensor:
        """`point: [2]`; returns a number."""
        y = torch.sin(FREQUENCY * self.second(torch.sin(FREQUENCY * self.first(point))))
        edge = 16 * (point * (1 - point)).prod(-1)
        return edge * self.last(y).squeeze(-1)


def exact(point: Float[Array, "2"]) -> Float[Array, ""]:
    """The solution: a wave, and a faster one."""
    x, y = jnp.pi * point
    return jnp.sin(x) * jnp.sin(y) + 0.5 * jnp.sin(3 * x) * jnp.sin(2 * y)


def source(point: Float[Array, "2"]) -> Float[Array, ""]:
    """The right-hand side `f`."""
    x, y = jnp.pi * point
    return jnp.pi**2 * (2 * jnp.sin(x) * jnp.sin(y) + 6.5 * jnp.sin(3 * x) * jnp.sin(2 * y))


def laplacian(model: torchleaf.TorchModule, point: Float[Array, "2"]) -> Float[Array, ""]:
    """The sum of the second derivatives, forward over reverse."""
    return jnp.trace(jax.hessian(lambda point: model(point))(point))


def loss_fn(model: torchleaf.TorchModule, points: Float[Array, "points 2"]) -> Float[Array, ""]:
    """How far the equation is from holding, mean square."""
    residuals = jax.vmap(lambda point: laplacian(model, point) + source(point))(points)
    return jnp.mean(residuals**2)


def error_of(model: torchleaf.TorchModule, points: Float[Array, "points 2"]) -> float:
    """The error of the solution in relation to its size."""
    expected = jax.vmap(exact)(points)
    found = jax.vmap(model)(points)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def compare_laplacians(model: torchleaf.TorchModule, points: Float[Array, "points 2"]) -> None:
    """torch differentiates twice by itself."""
    network = torchleaf.to_torch_module(model)
    given = torchleaf.to_torch(points, copy=True).requires_grad_()
    (gradient,) = torch.autograd.grad(network(given).sum(), given, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, i].sum(), given, retain_graph=True)[0][:, i] for i in range(2)]
    expected = torch.stack(rows).sum(0).numpy()
    found = jax.jit(jax.vmap(lambda point: laplacian(model, point)))(points)
    check("Laplacian, jax.hessian and torch.autograd", np.abs(found - expected).max() / np.abs(expected).max(), 1e-4)


def train(
    model: torchleaf.TorchModule, points: Array, steps: tuple[int, int]
) -> tuple[torchleaf.TorchModule, list[float]]:
    """The model after Adam and then L-BFGS, and the losses."""
    params, static = eqx.partition(model, torchleaf.trainable(model))
    losses = []

    def value(params) -> Float[Array, ""]:
        return loss_fn(eqx.combine(params, static), points)

    adam = optax.adam(optax.cosine_decay_schedule(2e-3, steps[0]))
    lbfgs = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(value)

    @jax.jit
    def adam_step(params, opt_state):
        loss, grads = jax.value_and_grad(value)(params)
        updates, opt_state = adam.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def lbfgs_step(params, opt_state):
        loss, grads = value_and_grad(params, state=opt_state)
        updates, opt_state = lbfgs.update(grads, opt_state, params, value=loss, grad=grads, value_fn=value)
        return optax.apply_updates(params, updates), opt_state, loss

    for name, step, optimizer, n in (("Adam", adam_step, adam, steps[0]), ("L-BFGS", lbfgs_step, lbfgs, steps[1])):
        opt_state = optimizer.init(params)
        for _, bar in progress(range(n), name):
            params, opt_state, loss = step(params, opt_state)
            losses.append(float(loss))
            bar.set_postfix(loss=f"{losses[-1]:.1e}")
    return eqx.combine(params, static), losses


def main() -> None:
    """Compare, train, draw."""
    arguments = parse_arguments(__doc__, "poisson.png")
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    model = torchleaf.TorchModule(Siren())
    points = jnp.asarray(rng.uniform(size=(200 if arguments.quick else 1000, 2)), jnp.float32)
    steps = (20, 5) if arguments.quick else (1000, 300)

    compare_laplacians(model, points[:50])
    model, losses = train(model, points, steps)
    side = jnp.linspace(0, 1, 65)
    grid = jnp.stack(jnp.meshgrid(side, side, indexing="ij"), -1)
    check("error of the solution", error_of(model, grid.reshape(-1, 2)), 0.5 if arguments.quick else 1e-2)

    picture, (solution, error, curve) = figure(3)
    found, expected = (jax.vmap(jax.vmap(f))(grid).T for f in (model, exact))
    square = {"origin": "lower", "extent": (0, 1, 0, 1)}
    picture.colorbar(solution.imshow(found, cmap="RdBu_r", **square), ax=solution)
    solution.set(title="Solution, a torch SIREN")
    picture.colorbar(error.imshow(np.abs(found - expected), cmap="Blues", **square), ax=error)
    error.set(title="Error")
    curve.semilogy(losses, color=DARK, linewidth=1)
    curve.axvline(steps[0], color=RED, linestyle="--", linewidth=1)
    curve.set(title="Loss: Adam, then L-BFGS", xlabel="step")
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
