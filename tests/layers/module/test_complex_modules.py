"""Modules with complex weights or Fourier transforms: gradients in JAX's convention, as of the same layer in jnp."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


def complex_randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64)


class Unitary(nn.Module):
    """Complex and real parameters, a complex buffer; z -> phase * (W z) + conj(z)."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(complex_randn(3, 3))
        self.angle = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", complex_randn(3))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.polar(torch.ones_like(self.angle), self.angle) * (z @ self.weight.mH) + z.conj() * self.shift


def unitary(p, z):
    return jnp.exp(1j * p["angle"]) * (z @ p["weight"].conj().T) + z.conj() * p["shift"]


class Spectral(nn.Module):
    """The layer of Fourier neural operators (Li et al., 2021): real signals in and out, complex weights between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(complex_randn(2, 3, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft(x)[..., : self.weight.shape[-1]]
        return torch.fft.irfft(torch.einsum("bim,iom->bom", modes, self.weight), n=x.shape[-1])


def spectral(p, x):
    modes = jnp.fft.rfft(x)[..., : p["weight"].shape[-1]]
    return jnp.fft.irfft(jnp.einsum("bim,iom->bom", modes, p["weight"]), n=x.shape[-1])


class Spectrum(nn.Module):
    """Power and phase of a windowed signal: complex only inside."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.fft.fft(x * self.window)
        return {"power": z.abs().square(), "phase": torch.view_as_real(z / (1 + z.abs()))}


def spectrum(p, x):
    z = jnp.fft.fft(x * p["window"])
    scaled = z / (1 + jnp.abs(z))
    return {"power": jnp.square(jnp.abs(z)), "phase": jnp.stack([scaled.real, scaled.imag], -1)}


@dataclass(frozen=True)
class Layer:
    """A module, the same in jnp, and what it takes."""

    make: Callable[[], nn.Module]
    twin: Callable[[dict[str, jax.Array], jax.Array], Any]
    draw: Callable[[], torch.Tensor]
    holomorphic: bool = False
    """In weights and inputs."""


LAYERS = {
    "Linear": Layer(
        lambda: nn.Linear(3, 4, dtype=torch.complex64),
        lambda p, z: z @ p["weight"].T + p["bias"],
        lambda: complex_randn(5, 3),
        holomorphic=True,
    ),
    "Conv1d": Layer(
        lambda: nn.Conv1d(2, 3, 1, dtype=torch.complex64),
        lambda p, z: jnp.einsum("oi,bil->bol", p["weight"][..., 0], z) + p["bias"][:, None],
        lambda: complex_randn(4, 2, 5),
        holomorphic=True,
    ),
    "products": Layer(
        lambda: nn.Sequential(nn.Linear(3, 3, bias=False, dtype=torch.complex64), nn.Tanh()),
        lambda p, z: jnp.tanh(z @ p["0.weight"].T),
        lambda: complex_randn(5, 3) / 2,
        holomorphic=True,
    ),
    "complex and real parameters": Layer(Unitary, unitary, lambda: complex_randn(5, 3)),
    "spectral convolution": Layer(Spectral, spectral, lambda: torch.randn(5, 2, 9)),
    "spectrum": Layer(Spectrum, spectrum, lambda: torch.randn(5, 8)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
every_holomorphic_layer = pytest.mark.parametrize(
    "layer", [x for x in LAYERS.values() if x.holomorphic], ids=[n for n, x in LAYERS.items() if x.holomorphic]
)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=2e-4, atol=2e-5)


def setup(layer: Layer):
    """The model, its twin as a function of `(params, x)`, and an input."""
    model = torchleaf.TorchModule(layer.make())
    return model, lambda params, x: layer.twin({**params, **model.buffers}, x), from_torch(layer.draw())


def of_params(model):
    """The model as a function of `(params, x)`."""
    return lambda params, x: eqx.tree_at(lambda m: m.params, model, params)(x)


def real_loss(function):
    """Weighs real and imaginary parts differently."""

    def run(*args):
        outputs = jax.tree.leaves(function(*args))
        return sum(jnp.sin(y.real).sum() + jnp.cos(2 * jnp.imag(y)).sum() for y in outputs)

    return run


@pytest.mark.long
@eager_and_filter_jit
@every_layer
def test_output_and_gradient_of_a_real_loss(layer, jit):
    model, twin, x = setup(layer)
    close(jit(of_params(model))(model.params, x), jax.jit(twin)(model.params, x))
    actual = jit(jax.grad(real_loss(of_params(model)), (0, 1)))(model.params, x)
    close(actual, jax.jit(jax.grad(real_loss(twin), (0, 1)))(model.params, x))


@eager_and_filter_jit
@every_holomorphic_layer
def test_holomorphic_gradient(layer, jit):
    model, twin, x = setup(layer)

    def gradient(function):
        return jax.grad(lambda *args: (function(*args) ** 2).sum(), (0, 1), holomorphic=True)

    close(jit(gradient(of_params(model)))(model.params, x), jax.jit(gradient(twin))(model.params, x))


@pytest.mark.long
@every_layer
def test_batches_and_directions(layer):
    """One batch at a time by vmap, gradients summed; forward mode; forward over reverse."""
    model, twin, x = setup(layer)
    xs = jnp.stack([x, 2 * x, -x])

    def derivatives(function):
        def run(params, x, xs):
            batched = jax.vmap(function, (None, 0))
            gradient = jax.grad(real_loss(function))
            return (
                jax.grad(real_loss(batched))(params, xs),
                jax.vmap(gradient, (None, 0))(params, xs),
                jax.jvp(function, (params, x), (jax.tree.map(jnp.cos, params), jnp.sin(x))),
                jax.jvp(lambda p: gradient(p, x), (params,), (jax.tree.map(jnp.cos, params),)),
            )

        return jax.jit(run)(model.params, x, xs)

    close(derivatives(of_params(model)), derivatives(twin))


@every_layer
def test_training_goes_downhill_as_in_jax(layer):
    """Along the conjugates of JAX's gradients, where complex parameters descend."""
    model, twin, x = setup(layer)
    optimizer = optax.chain(optax.stateless(lambda grads, _: jax.tree.map(jnp.conj, grads)), optax.sgd(1e-3))

    def train(function):
        def loss(params):
            return sum(jnp.square(jnp.abs(y)).mean() for y in jax.tree.leaves(function(params, x)))

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        params, state, values = model.params, optimizer.init(model.params), []
        for _ in range(10):
            params, state, value = step(params, state)
            values.append(value)
        return params, values

    actual, values = train(of_params(model))
    close((actual, values), train(twin))
    assert values[-1] < values[0]


def test_state_dict_of_complex_weights():
    module = Unitary()
    model = torchleaf.TorchModule(module)
    state = torchleaf.state_dict(model)
    assert {name: x.dtype for name, x in state.items()} == {name: x.dtype for name, x in module.state_dict().items()}
    close(torchleaf.load_state_dict(model, module.state_dict()).params, model.params)
