"""Gradients that torch makes sparse are dense in JAX, of every order and in every transform."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch, repeated_jit
from frameworks import every_framework
from module_reference import torch_gradients_of, torch_weighted_sum, weighted_sum
from torch import nn
from torchleaf import TorchModule

IDS = torch.tensor([[1, 2, 1], [0, 4, 3]])


class _Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.linear = nn.EmbeddingBag(5, 3, mode="sum", sparse=True), nn.Linear(3, 2)

    def forward(self, ids):
        return torch.tanh(self.linear(self.bag(ids)))


class _Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=2, scale_grad_by_freq=False, sparse=True)

    def forward(self, ids):
        return torch.sin(self.embedding(ids)) * self.embedding.weight.sum(0)


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(5, 3))

    def forward(self, ids):
        return torch.sin(nn.functional.embedding(ids, self.w, sparse=True))


def test_the_functional_form():
    """First-order reverse mode; under vmap by a loop."""
    module, ids = _Functional(), from_torch(IDS)
    model = TorchModule(module)
    gradient = jax.grad(lambda p, ids: weighted_sum(_with(model, p)(ids)))
    loss = torch_weighted_sum(module(IDS))
    expected = from_torch(torch.autograd.grad(loss, module.w)[0].to_dense())
    assert_trees_close(gradient(model.params, ids), {"w": expected})
    assert_trees_close(repeated_jit(gradient)(model.params, ids), {"w": expected})
    with pytest.warns(UserWarning, match="runs as a loop"):
        each = jax.vmap(gradient, in_axes=(None, 0))(model.params, ids)
    for i, row in enumerate(ids):
        assert_trees_close(each["w"][i], gradient(model.params, row)["w"])


MODULES = {"embedding": lambda: nn.Embedding(5, 3, sparse=True), "bag": _Bag, "padded": _Padded}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def _with(model, params):
    return eqx.tree_at(lambda m: m.params, model, params)


def _dense(module):
    """The same with dense gradients in torch."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if hasattr(part, "sparse"):
            part.sparse = False
    return twin


@every_module
@every_framework
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients(framework, make, residuals):
    module = make()
    model, twin = framework(module, residuals=residuals), _dense(module)
    expected, _ = torch_gradients_of(twin, twin, (IDS,), {})
    gradients = model.gradients(lambda m, ids: (weighted_sum(m(ids)), None), from_torch(IDS))
    assert_trees_close(gradients.weights.params, expected)


@pytest.mark.long
@every_module
@pytest.mark.filterwarnings("ignore:vmap of _Bag. torch.func.vmap cannot batch:UserWarning")  # embedding_bag
def test_compiled_batched_and_second_order(make):
    module, ids = make(), from_torch(IDS)
    model, like = TorchModule(module), TorchModule(_dense(module))

    def loss_of(model):
        return lambda p, ids: weighted_sum(_with(model, p)(ids) ** 2)

    grad, like_grad = (jax.grad(loss_of(m)) for m in (model, like))
    assert_trees_close(repeated_jit(grad)(model.params, ids), like_grad(model.params, ids))
    rows = ids[:, None]
    assert_trees_close(
        jax.vmap(grad, in_axes=(None, 0))(model.params, rows),
        jax.vmap(like_grad, in_axes=(None, 0))(model.params, rows),
    )
    direction = jax.tree.map(jnp.cos, model.params)
    if make is _Bag:  # torch has neither a double backward of `embedding_bag` nor forward mode
        with pytest.raises(Exception, match="'_embedding_bag_backward' is not implemented"):
            jax.jvp(lambda p: grad(p, ids), (model.params,), (direction,))
        return
    hvps = [jax.jvp(lambda p, g=g: g(p, ids), (model.params,), (direction,))[1] for g in (grad, like_grad)]
    assert_trees_close(*hvps)


def test_a_sparse_result_of_a_matrix_product():
    """`torch.sparse.mm` of a dense weight: its gradient is dense; of a sparse constant there is none."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.adjacency = torch.eye(3).to_sparse()
            self.w = nn.Parameter(torch.rand(3, 2))

        def forward(self, x):
            return torch.sparse.mm(self.adjacency, x @ self.w)

    module, x = Graph(), torch.rand(3, 3)
    gradient = jax.grad(lambda p: weighted_sum(_with(model, p)(from_torch(x))))
    model = TorchModule(module)
    assert_trees_close(gradient(model.params), torch_gradients_of(module, module, (x,), {})[0])
