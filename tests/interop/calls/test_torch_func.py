"""Functions that differentiate and batch by themselves, in torch, as JAX functions: derivatives of derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit, torch_gradients_of, weighted_sum
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from twins import Twin

pytestmark = [
    pytest.mark.both_engines(every=4),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch.func.jvp uses it
    pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning"),  # torch.autograd.grad cannot be batched
]


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=2e-4, atol=2e-5)


def energy_torch(x, w):
    return torch.tanh(w @ x).square().sum() + (x * w[0]).sin().prod()


def energy_jax(x, w):
    return jnp.square(jnp.tanh(w @ x)).sum() + jnp.sin(x * w[0]).prod()


def field_torch(x, w):
    return torch.sin(w @ x) * x.square().sum()


def field_jax(x, w):
    return jnp.sin(w @ x) * jnp.square(x).sum()


def vjp_torch(x, w):
    outs, pullback = vjp(field_torch, x, w)
    return outs, *pullback(outs.cos())


def vjp_jax(x, w):
    outs, pullback = jax.vjp(field_jax, x, w)
    return outs, *pullback(jnp.cos(outs))


# --- torch.autograd.grad inside, as for physics-informed networks and force fields -------------


def residual_torch(x, w):
    """Of a differential equation: the second derivative of a network along its input."""
    x = x.requires_grad_()
    u = torch.tanh(x[:, None] * w).sum(1)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return ddu + u * du


def residual_jax(x, w):
    def u(t):
        return jnp.tanh(t * w).sum()

    return jax.vmap(lambda t: jax.grad(jax.grad(u))(t) + u(t) * jax.grad(u)(t))(x)


def forces_torch(x, w):
    """Of positions that the function itself cuts from whatever computed them."""
    x = x.detach().requires_grad_()
    total = energy_torch(x, w)
    return total, -torch.autograd.grad(total, x, create_graph=True)[0]


def forces_jax(x, w):
    total, gradient = jax.value_and_grad(energy_jax)(jax.lax.stop_gradient(x), w)
    return total, -gradient


def backward_torch(x, w):
    """By `backward()`, into `.grad`, and not differentiable itself: a constant."""
    x = x.detach().clone().requires_grad_()
    energy_torch(x, w).backward()
    assert x.grad is not None
    return x.grad * w


def backward_jax(x, w):
    return jax.lax.stop_gradient(jax.grad(energy_jax)(x, w)) * w


NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).requires_grad_(False)
W1, B1, W2, B2 = (jnp.asarray(p.numpy()) for p in NETWORK.parameters())


def network_torch(x, w):
    """`functional_call` with one parameter from outside."""
    return functional_call(NETWORK, {"0.weight": w.tile(4, 1)}, (x,))


def network_jax(x, w):
    return W2 @ jnp.tanh(jnp.tile(w, (4, 1)) @ x + B1) + B2


SQUARE = ((3,), (2, 3))
TWINS = {
    "grad": Twin(grad(energy_torch, argnums=(0, 1)), jax.grad(energy_jax, argnums=(0, 1)), SQUARE),
    "vjp": Twin(vjp_torch, vjp_jax, SQUARE),
    "jvp": Twin(
        lambda x, w: jvp(field_torch, (x, w), (x.cos(), w.sin())),
        lambda x, w: jax.jvp(field_jax, (x, w), (jnp.cos(x), jnp.sin(w))),
        SQUARE,
    ),
    "jacrev": Twin(jacrev(field_torch), jax.jacrev(field_jax), SQUARE),
    "jacfwd": Twin(jacfwd(field_torch, argnums=1), jax.jacfwd(field_jax, argnums=1), SQUARE),
    "hessian": Twin(hessian(energy_torch), jax.hessian(energy_jax), SQUARE),
    "vmap": Twin(vmap(field_torch, (None, 0)), jax.vmap(field_jax, (None, 0)), ((3,), (4, 2, 3))),
    "gradients per example": Twin(
        vmap(grad(energy_torch), (0, None)), jax.vmap(jax.grad(energy_jax), (0, None)), ((4, 3), (2, 3))
    ),
    "functional_call": Twin(network_torch, network_jax, ((3,), (3,))),
    "jacobian of functional_call": Twin(jacrev(network_torch, (0, 1)), jax.jacrev(network_jax, (0, 1)), ((3,), (3,))),
    "autograd.grad, twice": Twin(residual_torch, residual_jax, ((4,), (3,))),
    "autograd.grad after detach": Twin(forces_torch, forces_jax, SQUARE),
    "backward()": Twin(backward_torch, backward_jax, SQUARE),
}


def loss(function):
    return lambda *args: sum(jnp.sin(y).sum() for y in jax.tree.leaves(function(*args)))


TRANSFORMS = {
    "value": lambda f, *xs: f(*xs),
    "gradient of both": lambda f, *xs: jax.grad(loss(f), (0, 1))(*xs),
    "gradient of the weights": lambda f, *xs: jax.grad(loss(f), 1)(*xs),
    "jvp": lambda f, *xs: jax.jvp(f, xs, tuple(jnp.cos(x) for x in xs)),
    "vmap": lambda f, x, w: jax.vmap(f, (0, None))(jnp.stack([x, 2 * x, -x]), w),
    "vmap of gradient": lambda f, x, w: jax.vmap(jax.grad(loss(f), (0, 1)), (0, None))(jnp.stack([x, 2 * x]), w),
    "gradient of vmap": lambda f, x, w: jax.grad(loss(jax.vmap(f, (0, None))), 1)(jnp.stack([x, 2 * x]), w),
    "Hessian times vector": lambda f, *xs: jax.jvp(jax.grad(loss(f), (0, 1)), xs, tuple(jnp.cos(x) for x in xs)),
}


every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


@pytest.mark.long
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@every_twin
def test_transform(twin, transform):
    args = twin.arguments()
    close(jax.jit(lambda *xs: transform(twin.ours, *xs))(*args), jax.jit(lambda *xs: transform(twin.jax, *xs))(*args))


@pytest.mark.long
@every_twin
def test_eagerly(twin):
    args = twin.arguments()
    close(twin.ours(*args), jax.jit(twin.jax)(*args))
    close(jax.grad(loss(twin.ours), (0, 1))(*args), jax.jit(jax.grad(loss(twin.jax), (0, 1)))(*args))


class Potential(torch.nn.Module):
    """Energy and forces of a network, as molecular dynamics uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions.requires_grad_(True)
        total = self.network(positions).sum()
        return total, -torch.autograd.grad(total, positions, create_graph=True)[0]


@eager_and_filter_jit
def test_module_with_forces(jit):
    """Training on forces: the gradient of a gradient, with respect to weights and positions."""
    module, positions = Potential(), torch.randn(5, 3)

    def run(inputs):
        model, positions = inputs
        output = model(positions)
        return weighted_sum(output), output

    grads, output = jit(eqx.filter_grad(run, has_aux=True))((torchleaf.TorchModule(module), from_torch(positions)))
    close(output, from_torch(module(positions.clone())))
    close((grads[0].params, [grads[1]]), torch_gradients_of(module, module, (positions,), {}))
