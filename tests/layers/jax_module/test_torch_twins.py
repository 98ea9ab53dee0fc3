"""Models of JAX in torch against the same models written in torch, of the same parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from flax import nnx
from jax_models import KEY, NNXCNN, Attention, LinenCNN, rnn, rnn_params


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def mlp(p, x, name="layers", activation=torch.relu):
    return linear(p, f"{name}.1", activation(linear(p, f"{name}.0", x)))


def block(p, x):
    def norm(i, x):
        return F.layer_norm(x, (8,), p[f"norms.{i}.weight"], p[f"norms.{i}.bias"])

    def heads(name):
        return linear(p, f"attention.{name}_proj", norm(0, x)).unflatten(-1, (2, 4)).transpose(0, 1)

    y = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value")).transpose(0, 1).flatten(1)
    x = x + linear(p, "attention.output_proj", y)
    return x + mlp(p, norm(1, x), "mlp.layers", lambda y: F.gelu(y, approximate="tanh"))


def cnn(conv, norm, statistics, head):
    """A CNN by the names that its layers have."""

    def call(p, x, train):
        kernel = p[f"{conv}.kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(x.permute(0, 3, 1, 2), kernel, p[f"{conv}.bias"], padding=1)
        mean, var = p[f"{statistics}.mean"].clone(), p[f"{statistics}.var"].clone()
        x = F.batch_norm(x, mean, var, p[f"{norm}.scale"], p[f"{norm}.bias"], training=train)
        return F.relu(x).mean((2, 3)) @ p[f"{head}.kernel"] + p[f"{head}.bias"]

    return call


def torch_rnn(p, xs):
    h = torch.zeros(4, dtype=xs.dtype)
    for x in xs:
        h = torch.tanh(h @ p["hidden"] + x @ p["input"] + p["bias"])
    return h


def wave(params, x):
    return jnp.abs(jnp.exp(1j * (x @ params["frequency"])) @ params["amplitude"]) ** 2


def torch_wave(p, x):
    return (torch.exp(1j * (x @ p["frequency"])) @ p["amplitude"]).abs() ** 2


def wave_params():
    amplitude = jnp.asarray([1 + 1j, 2 - 1j])
    return {"frequency": jax.random.normal(KEY, (3, 2)), "amplitude": amplitude}


def linen_cnn():
    module = LinenCNN(rate=0.0)
    return torchleaf.JaxModule(module, module.init(KEY, jnp.ones((2, 6, 6, 1)), False))


def in_mode(twin, training):
    return lambda p, x: twin(p, x, training)


LINEN, NNX = ("Conv_0", "BatchNorm_0", "batch_stats.BatchNorm_0", "Dense_0"), ("conv", "norm", "norm", "head")
TWINS = {
    "mlp": (lambda: torchleaf.JaxModule(eqx.nn.MLP(3, 2, 16, 1, jax.nn.relu, key=KEY)), mlp, (3,), True),
    "transformer block": (lambda: torchleaf.JaxModule(Attention(KEY)), block, (5, 8), True),
    "scanned rnn": (lambda: torchleaf.JaxModule(rnn, rnn_params()), torch_rnn, (5, 8), True),
    "complex": (lambda: torchleaf.JaxModule(wave, wave_params()), torch_wave, (4, 3), True),
}
for mode in (True, False):
    name = "training" if mode else "evaluation"
    TWINS[f"linen cnn in {name}"] = (linen_cnn, in_mode(cnn(*LINEN), mode), (2, 6, 6, 1), mode)
    make_nnx = lambda: torchleaf.JaxModule(NNXCNN(nnx.Rngs(0), rate=0.0))  # noqa: E731
    TWINS[f"nnx cnn in {name}"] = (make_nnx, in_mode(cnn(*NNX), mode), (2, 6, 6, 1), mode)


@pytest.mark.parametrize("name", TWINS)
def test_values_and_derivatives_of_two_orders(name, x64):
    make, twin, shape, training = TWINS[name]
    model = make().double().train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = {name: p for name, p in model.named_parameters() if not name.endswith("amplitude")}
    named = {**model.state_dict(), **dict(model.named_parameters())}

    def derivatives(y):
        first = torch.autograd.grad((y**2).sum(), (x, *weights.values()), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), (x, *weights.values()))
        return y, first, second

    expected = derivatives(twin(named, x))
    torch.testing.assert_close(derivatives(model(x)), expected, rtol=1e-6, atol=1e-8)
    assert sum(g.abs().sum() for g in expected[2]) > 0


def test_the_parameters_can_be_complex(x64):
    model = torchleaf.JaxModule(wave, wave_params()).double()
    amplitude = dict(model.named_parameters())["amplitude"]
    assert amplitude.dtype == torch.complex128
    x = torch.randn(4, 3, dtype=torch.float64)
    ours, expected = (
        torch.autograd.grad(y.sum(), amplitude)[0] for y in (model(x), torch_wave(dict(model.named_parameters()), x))
    )
    torch.testing.assert_close(ours, expected)
