"""A tensor is one array to JAX for as long as both are the same, and no longer."""

import gc
import weakref

import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torchleaf.interop.jax_calls import views


@pytest.fixture
def made(monkeypatch):
    """The tensors of which an array was made."""
    tensors = []

    def counted(tensor, device):
        tensors.append(tensor)
        return make(tensor, device)

    make = views.view_as_array
    monkeypatch.setattr(views, "view_as_array", counted)
    return tensors


def test_parameters_and_residuals_are_viewed_once(made):
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    layer = torchleaf.jax_function(lambda w, x: jnp.sin(jnp.cos(x @ w.T)))
    for step in range(3):
        layer(weight, x).sum().backward()
        assert len(made) == 3 + step  # weight, x, and each step's cotangent


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("change", [
    lambda x: x.mul_(2.0),
    lambda x: x.t_(),
    lambda x: x.resize_(2, 3),
    lambda x: x.resize_(5, 5).fill_(3.0),
    lambda x: x.unsqueeze_(1),
    lambda x: x.set_(torch.randn(4, 2, dtype=x.dtype)),
    lambda x: setattr(x, "data", torch.randn_like(x)),
    lambda x: setattr(x, "data", x.data.view(torch.bfloat16 if x.itemsize == 2 else torch.float32).neg_()),
    lambda x: setattr(x, "data", x.data.clone()),
    lambda x: setattr(x, "data", x.data.bfloat16()),
], ids=["values", "strides", "size", "larger", "axis", "storage", "data", "bits", "copy", "dtype"])  # fmt: skip
def test_what_torch_makes_of_a_tensor_in_place_is_seen(change, dtype):
    double = torchleaf.jax_function(lambda x: 2 * x)
    x = torch.randn(3, 2).to(dtype)
    for _ in range(2):
        torch.testing.assert_close(double(x), 2 * x)
    change(x)
    for _ in range(2):
        torch.testing.assert_close(double(x), 2 * x)


def test_an_output_that_is_written_into_is_seen():
    double = torchleaf.jax_function(lambda x: 2 * x)
    y = double(torch.ones(3))
    y[1] = 5.0
    torch.testing.assert_close(double(y), torch.tensor([4.0, 10.0, 4.0]))


def test_tensors_are_dropped_with_their_memory():
    layer = torchleaf.jax_function(lambda w, x: jnp.tanh(x @ w.T))
    weight = torch.randn(3, 4, requires_grad=True)
    gc.collect()
    before, storages = len(views._views), []
    for _ in range(50):
        x, first = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
        storages += [weakref.ref(t.untyped_storage()) for t in (x, first)]
        (layer(weight, x) + layer(weight, first) + layer(weight, x[:1])).sum().backward()
    del x, first
    gc.collect()
    assert len(views._views) - before <= 1  # the weight
    assert not any(storage() for storage in storages)


def test_memory_that_a_parameter_gives_up_is_dropped_when_it_is_seen_again():
    double = torchleaf.jax_function(lambda x: 2 * x)
    parameter = torch.nn.Parameter(torch.randn(8))
    double(parameter)
    old = weakref.ref(parameter.data.untyped_storage())
    parameter.data = torch.randn(8)
    double(parameter)
    gc.collect()
    assert old() is None
