"""GPyTorch: kernels, exact and variational Gaussian processes, likelihoods, deep kernels."""

from typing import Any

import torch
from torch import nn

from .driver import zoo_test
from .specimen import Specimen

POINTS = 6


class ExactLikelihood(nn.Module):
    """The negative marginal log likelihood of an exact GP, as its training loop computes it, of other targets too."""

    def __init__(self, kernel: nn.Module, features: nn.Module | None = None):
        super().__init__()
        import gpytorch

        class Model(gpytorch.models.ExactGP):
            def __init__(self, likelihood: Any):
                super().__init__(*data(), likelihood)
                self.mean_module, self.covar_module, self.features = gpytorch.means.ConstantMean(), kernel, features

            def forward(self, x: torch.Tensor) -> Any:
                x = x if self.features is None else self.features(x)
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

        self.likelihood = gpytorch.likelihoods.GaussianLikelihood()
        self.model = Model(self.likelihood)
        self.mll = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.model)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return -self.mll(self.model(*self.model.train_inputs), y)


class Posterior(ExactLikelihood):
    """The mean of the posterior at new points, given the model's own training points."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).mean


class Prediction(nn.Module):
    """Mean and variance of the posterior at new points, given training points."""

    def __init__(self) -> None:
        super().__init__()
        import gpytorch

        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

    def forward(self, x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = self.kernel(x).add_diagonal(self.likelihood.noise)
        across = self.kernel(new, x).to_dense()
        solved = noisy.solve(torch.cat([y[:, None], across.mT], dim=1))
        return across @ solved[:, 0], self.kernel(new).to_dense().diagonal() - (across * solved[:, 1:].mT).sum(1)


class Bound(nn.Module):
    """The negative evidence lower bound of a sparse variational GP."""

    def __init__(self, likelihood: nn.Module):
        super().__init__()
        import gpytorch
        from gpytorch import variational

        class Model(gpytorch.models.ApproximateGP):
            def __init__(self) -> None:
                inducing = torch.linspace(-1, 1, 4)[:, None]
                distribution = variational.CholeskyVariationalDistribution(len(inducing))
                distribution.variational_mean.data.normal_()  # as after some training
                super().__init__(variational.VariationalStrategy(self, inducing, distribution))
                self.mean_module = gpytorch.means.ConstantMean()
                self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

            def forward(self, x: torch.Tensor) -> Any:
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

        self.model, self.likelihood = Model(), likelihood
        self.model.variational_strategy.variational_params_initialized.fill_(1)
        self.elbo = gpytorch.mlls.VariationalELBO(likelihood, self.model, num_data=POINTS)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -self.elbo(self.model(x), y)


class Covariance(nn.Module):
    """A kernel's matrix."""

    def __init__(self, kernel: nn.Module):
        super().__init__()
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x).to_dense()


def kernel(name: str, **options: Any) -> nn.Module:
    import gpytorch

    return gpytorch.kernels.ScaleKernel(getattr(gpytorch.kernels, name)(**options))


def sum_of_kernels() -> nn.Module:
    return kernel("MaternKernel", nu=2.5) + kernel("LinearKernel")


def likelihood(name: str) -> nn.Module:
    import gpytorch

    return getattr(gpytorch.likelihoods, name)()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(POINTS, 2)
    return x, torch.sin(3 * x.sum(1)) + 0.1 * torch.randn(POINTS)


def targets() -> tuple[torch.Tensor]:
    return (data()[1],)


def line() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(POINTS, 1)
    return x, torch.sin(3 * x[:, 0])


def labels() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = line()
    return x, (y > 0.5).float()


def deep_kernel() -> nn.Module:
    return ExactLikelihood(kernel("RBFKernel"), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)))


test_gpytorch = zoo_test(
    "gpytorch",
    Specimen("RBF kernel", lambda: Covariance(kernel("RBFKernel", ard_num_dims=2)), lambda: data()[:1]),
    Specimen("Matern + linear kernel", lambda: Covariance(sum_of_kernels()), lambda: data()[:1]),
    Specimen("exact, RBF", lambda: ExactLikelihood(kernel("RBFKernel")), targets, training=True),
    Specimen("exact, Matern + linear", lambda: ExactLikelihood(sum_of_kernels()), targets, training=True),
    Specimen("exact, deep kernel", deep_kernel, targets, training=True),
    Specimen(
        "posterior",
        lambda: Posterior(kernel("RBFKernel")),
        lambda: (torch.rand(3, 2),),
        not_asked={"training": "GPyTorch caches the solution for the weights it first predicts with"},
    ),
    Specimen("prediction", Prediction, lambda: (*data(), torch.rand(3, 2))),
    Specimen("variational", lambda: Bound(likelihood("GaussianLikelihood")), line, training=True),
    Specimen("variational, Bernoulli", lambda: Bound(likelihood("BernoulliLikelihood")), labels, training=True),
)
