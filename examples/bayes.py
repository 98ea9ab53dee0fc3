"""Bayesian inference with a torch likelihood: NumPyro's NUTS, and a zuko flow fitted by variational inference.

The likelihood is a `torch.nn.Module`, a regression on waves. NumPyro puts a prior on each of its parameters, by their
torch names, and NUTS samples them, leapfrog by leapfrog, in one compiled program. Then a normalising flow, a torch
module of zuko's, is fitted to the same posterior by optax, maximising the evidence lower bound (ELBO). The regression
is linear in its parameters, so posterior and evidence are known in closed form, and both are compared with them.

    python examples/bayes.py --output bayes.png
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro  # pyright: ignore[reportMissingImports]
import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
import optax
import torch
import torchleaf
import zuko  # pyright: ignore[reportMissingImports]
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save
from jaxtyping import Array, Float
from numpyro.infer import MCMC, NUTS  # pyright: ignore[reportMissingImports]

WAVES, NOISE = 3, 0.2
SIZE = 2 * WAVES + 1
"""How many parameters there are: weights, and a bias."""

Parameters = Float[Array, f"{SIZE}"]


class Regression(torch.nn.Module):
    """Normal measurements around a sum of waves."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2 * WAVES, 1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """`x: [n]`; returns `[n, 2 * WAVES]`."""
        phases = x[:, None] * torch.arange(1, WAVES + 1)
        return torch.cat([phases.sin(), phases.cos()], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The expected measurements."""
        return self.layer(self.features(x)).squeeze(-1)

    def log_likelihood(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of measurements, a number."""
        return torch.distributions.Normal(self(x), NOISE, validate_args=False).log_prob(y).sum()


class Flow(torch.nn.Module):
    """A neural autoregressive flow from noise to parameters, with the logarithm of its Jacobian's determinant."""

    def __init__(self):
        super().__init__()
        self.flow = zuko.flows.MAF(SIZE, transforms=3, hidden_features=(32,))

    def forward(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`noise: [..., SIZE]`; returns the same shape, and `[...]`."""
        return self.flow().transform.call_and_ladj(noise)


def with_parameters(model: torchleaf.TorchModule, values: Parameters) -> torchleaf.TorchModule:
    """The model with other weights and another bias."""
    new = {"layer.weight": values[None, :-1], "layer.bias": values[-1:]}
    return eqx.tree_at(lambda model: model.params, model, new)


def sample(model: torchleaf.TorchModule, x: np.ndarray, y: np.ndarray, key: Array, n: int) -> Float[Array, "n SIZE"]:
    """Parameters from the posterior, by NUTS."""

    def program() -> None:
        priors = {name: dist.Normal(jnp.zeros_like(value), 1).to_event() for name, value in model.params.items()}
        drawn = {name: numpyro.sample(name, prior) for name, prior in priors.items()}
        likelihood = eqx.tree_at(lambda model: model.params, model, drawn)
        numpyro.factor("likelihood", likelihood.call("log_likelihood", x, y))

    mcmc = MCMC(NUTS(program), num_warmup=n // 2, num_samples=n)
    mcmc.run(key)
    samples = mcmc.get_samples()
    return jnp.concatenate([samples["layer.weight"][:, 0], samples["layer.bias"]], -1)


def fit(model: torchleaf.TorchModule, x: np.ndarray, y: np.ndarray, key: Array, steps: int):
    """A flow that approximates the posterior, and its ELBOs."""
    params, static = eqx.partition(torchleaf.TorchModule(Flow()), eqx.is_inexact_array)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def log_joint(values: Parameters) -> Float[Array, ""]:
        return with_parameters(model, values).call("log_likelihood", x, y) + normal(values)

    def normal(z: Array) -> Float[Array, "..."]:
        return -0.5 * jnp.sum(z**2, -1) - 0.5 * SIZE * math.log(2 * math.pi)

    def elbo(params, noise) -> Float[Array, ""]:
        values, log_det = eqx.combine(params, static)(noise)
        return jnp.mean(jax.vmap(log_joint)(values) - normal(noise) + log_det)

    @jax.jit
    def step(params, opt_state, key):
        loss, grads = jax.value_and_grad(lambda params: -elbo(params, jax.random.normal(key, (64, SIZE))))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, -loss

    opt_state, elbos = optimizer.init(params), []
    for i, bar in progress(range(steps), "fitting the flow"):
        params, opt_state, value = step(params, opt_state, jax.random.fold_in(key, i))
        elbos.append(float(value))
        bar.set_postfix(elbo=f"{elbos[-1]:.2f}")
    noise = jax.random.normal(key, (4000, SIZE))
    return eqx.combine(params, static)(noise)[0], float(elbo(params, noise)), elbos


def exact(features: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of the posterior, and the logarithm of the evidence."""
    covariance = np.linalg.inv(features.T @ features / NOISE**2 + np.eye(SIZE))
    marginal = features @ features.T + NOISE**2 * np.eye(len(y))
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * math.pi * marginal)[1])
    return covariance @ features.T @ y / NOISE**2, covariance, float(evidence)


def main() -> None:
    """Measure, sample, fit, compare, draw."""
    arguments = parse_arguments(__doc__, "bayes.png")
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    x = np.concatenate([rng.uniform(-3, -0.5, 15), rng.uniform(1, 3, 15)]).astype(np.float32)  # nothing in between
    y = (np.sin(2 * x) + 0.5 * np.cos(x) + NOISE * rng.normal(size=x.shape)).astype(np.float32)
    model = torchleaf.TorchModule(Regression())
    keys = jax.random.split(jax.random.key(arguments.seed))
    n, steps = (300, 200) if arguments.quick else (4000, 3000)

    features = np.concatenate([np.asarray(model.call("features", x), np.float64), np.ones((len(x), 1))], -1)
    mean, covariance, evidence = exact(features, y.astype(np.float64))
    deviation = np.sqrt(np.diag(covariance))
    sampled = np.asarray(sample(model, x, y, keys[0], n))
    flowed, elbo, elbos = fit(model, x, y, keys[1], steps)
    for name, draws in (("NUTS", sampled), ("flow", np.asarray(flowed))):
        error = np.abs((draws.mean(0) - mean) / deviation).max()
        check(f"{name}: means, in posterior deviations", error, 0.5 if arguments.quick else 0.1)
        error = np.abs(draws.std(0) / deviation - 1).max()
        check(f"{name}: deviations, in relation", error, 0.5 if arguments.quick else 0.1)
    check("flow: evidence less ELBO, which is its divergence", evidence - elbo, 5.0 if arguments.quick else 0.1)

    picture, (curves, marginal, bound) = figure(3)
    grid = np.linspace(-4, 4, 201, dtype=np.float32)
    drawn = jax.vmap(lambda values: with_parameters(model, values)(grid))(jnp.asarray(sampled[-60:]))
    curves.plot(grid, drawn.T, color=DARK, alpha=0.12, linewidth=0.8)
    curves.plot(x, y, ".", color=RED)
    curves.set(title="A torch regression, sampled by NUTS", xlabel="x")
    bins = np.linspace(mean[0] - 4 * deviation[0], mean[0] + 4 * deviation[0], 41)
    marginal.hist(sampled[:, 0], bins, density=True, color=LIGHT, label="NUTS")
    marginal.hist(flowed[:, 0], bins, density=True, color=DARK, histtype="step", label="flow")
    density = np.exp(-0.5 * ((bins - mean[0]) / deviation[0]) ** 2) / (deviation[0] * math.sqrt(2 * math.pi))
    marginal.plot(bins, density, color=RED, linewidth=1.2, label="exact")
    marginal.set(title="Posterior of the first weight")
    marginal.legend(frameon=False)
    bound.plot(elbos, color=DARK, linewidth=0.8)
    bound.axhline(evidence, color=RED, linestyle="--", linewidth=1)
    bound.set(title="ELBO of the flow, and the evidence", xlabel="step", ylim=(evidence - 30, evidence + 5))
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
