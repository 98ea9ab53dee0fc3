"""Modules that write into their inputs and weights compute what they do in torch; JAX's arrays stay as they were."""

import copy
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit, torch_gradients_of, weighted_sum
from torch import nn
from torchleaf import TorchModule
from untouched import unchanged
from written_forwards import module_of, run

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)
IDS = torch.tensor([[0, 3, 3], [1, 0, 4]])

residuals = pytest.mark.parametrize("residuals", ["live", "recompute"])


# --- modules that write --------------------------------------------------------------------------


def _into_input(self, x):
    x += 1
    return self.linear(x)


def _into_view_of_input(self, x):
    x.t()[0].mul_(3)
    x[:, 1:] = self.scale[1:]
    return self.linear(x)


def _into_view_of_expanded_input(self, x):
    x.expand(4, 2, 3)[2].sub_(1)
    return self.linear(x)


def _into_input_through_detach(self, x):
    x.detach().clamp_(-1, 1)
    return self.linear(x)


def _weights_into_input(self, x):
    x.mul_(self.linear.bias).add_(self.frozen)
    return self.linear(x)


def _clamp_weight(self, x):
    with torch.no_grad():
        self.linear.weight.clamp_(-0.2, 0.2)
    return self.linear(x)


def _weight_data(self, x):
    self.linear.weight.data.mul_(0.5)
    return self.linear(x)


def _assign_weight_data(self, x):
    self.linear.weight.data = self.linear.weight.data * 0.5
    return self.linear(x)


def _into_view_of_weight(self, x):
    with torch.no_grad():
        self.linear.weight[0].zero_()
        self.linear.weight.t().add_(0.1)
    return self.linear(x)


def _weight_as_out_argument(self, x):
    with torch.no_grad():
        torch.add(self.linear.weight, 1, out=self.linear.weight)
    return self.linear(x)


def _input_into_weight(self, x):
    self.linear.bias.detach().copy_(x.detach().sum(0))
    return self.linear(x)


def _into_frozen(self, x):
    self.frozen.mul_(2)
    return self.linear(x) * self.frozen


def _into_output(self, x):
    y = self.linear(x)
    y += x
    y[0] = 0
    return y, y.t()


def _norm_of_embeddings(self, ids):
    return self.embedding(ids) + self.scale


def _clamps(linear, args):
    linear.weight.data.clamp_(-0.2, 0.2)


def _clamped_by_hook():
    module = nn.Sequential(nn.Tanh(), nn.Linear(3, 3))
    module[1].register_forward_pre_hook(_clamps)
    return module


def _tied():
    module = nn.Sequential(module_of(_clamp_weight), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].linear.weight
    return module


MODULES = {
    "in-place-ReLU-first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)),
    "in-place-ReLU-only": lambda: nn.ReLU(inplace=True),
    "hook": _clamped_by_hook,
    "tied": _tied,
    "bag-of-embeddings": lambda: nn.EmbeddingBag(5, 3, max_norm=0.5, mode="sum"),
    **{
        forward.__name__.strip("_"): functools.partial(module_of, forward)
        for forward in (
            _into_input,
            _into_view_of_input,
            _into_view_of_expanded_input,
            _into_input_through_detach,
            _weights_into_input,
            _clamp_weight,
            _weight_data,
            _assign_weight_data,
            _into_view_of_weight,
            _weight_as_out_argument,
            _input_into_weight,
            _into_frozen,
            _into_output,
            _norm_of_embeddings,
        )
    },
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]()


def input_of(module):
    takes_ids = isinstance(module, nn.EmbeddingBag) or type(module).__name__ == "_norm_of_embeddings"
    return IDS if takes_ids else X


@eager_and_filter_jit
def test_output(module, jit):
    """The second call finds nothing of what the first one wrote."""
    model, x = TorchModule(module), input_of(module)
    call, array = jit(lambda m, x: m(x)), from_torch(x)
    with unchanged(model, array, torch_module=module):
        for _ in range(2):
            assert_trees_close(call(model, array), from_torch(run(module, x)))


@residuals
@eager_and_filter_jit
def test_gradients(module, jit, residuals):
    model, x = TorchModule(module, residuals=residuals), input_of(module)
    array, twin = from_torch(x), copy.deepcopy(module)
    with unchanged(model, array, torch_module=module):
        for wrapper in (lambda f: f, eqx.filter_checkpoint):
            loss = wrapper(lambda inputs: weighted_sum(inputs[0](inputs[1])))
            grads, grad_of_x = jit(eqx.filter_grad(loss))((model, array))
            expected, expected_of_x = torch_gradients_of(twin, copy_weights(twin, module), (x,), {})
            assert_trees_close(grads.params, expected)
            assert_trees_close([] if grad_of_x is None else [grad_of_x], expected_of_x)
            assert not any(jnp.any(g) for g in jax.tree.leaves((grads.frozen, grads.buffers)))


def copy_weights(twin, module):
    """`twin` with the weights of `module` once more."""
    twin.load_state_dict(module.state_dict())
    return twin


@eager_and_filter_jit
def test_forward_mode(module, jit):
    """It is the transpose of reverse mode."""
    model, x = TorchModule(module), from_torch(input_of(module))
    inputs, static = eqx.partition((model.params, x), eqx.is_inexact_array)
    tangents = jax.tree.map(jnp.cos, inputs)

    def call(inputs):
        params, x = eqx.combine(inputs, static)
        return eqx.tree_at(lambda m: m.params, model, params)(x)

    with unchanged(model, inputs, tangents, torch_module=module):
        outputs, out_tangents = jit(lambda x, dx: jax.jvp(call, (x,), (dx,)))(inputs, tangents)
        cotangents = jax.tree.map(jnp.sin, outputs)
        (grads,) = jax.vjp(call, inputs)[1](cotangents)
    assert_trees_close(dot(cotangents, out_tangents), dot(grads, tangents), rtol=1e-4)


def dot(a, b):
    return sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
@pytest.mark.parametrize("in_axes", [0, 1])
def test_batch_of_inputs(module, in_axes):
    """Each example finds the weights as they were."""
    model, x = TorchModule(module), from_torch(input_of(module))
    rows = [x, x[::-1], 2 * x % 5]
    xs = jnp.stack(rows, in_axes)

    def batch(model, xs):
        return jax.vmap(model, in_axes)(xs)

    def one_by_one(model, xs):
        return jax.tree.map(lambda *ys: jnp.stack(ys), *(model(jnp.take(xs, i, in_axes)) for i in range(3)))

    with unchanged(model, xs, torch_module=module):
        (ys, grads), (expected, expected_grads) = (outputs_and_gradients(f)((model, xs)) for f in (batch, one_by_one))
    assert_trees_close((ys, jax.tree.leaves(grads)), (expected, jax.tree.leaves(expected_grads)))


def outputs_and_gradients(function):
    def loss(inputs):
        outputs = function(*inputs)
        return weighted_sum(outputs), outputs

    return lambda inputs: eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(inputs)[::-1]


@pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
def test_batch_of_models(module):
    """An ensemble writes into the input that it shares, each model on its own."""
    modules = [module, rescaled(module, 0.5), rescaled(module, -2)]
    models, x = torchleaf.stack([TorchModule(m) for m in modules]), input_of(module)
    array = from_torch(x)
    with unchanged(models, array, torch_module=module):
        ys = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None), axis_size=3)(models, array)
    expected = jax.tree.map(lambda *rows: torch.stack(rows), *(run(m, x) for m in modules))
    assert_trees_close(ys, from_torch(expected))


def rescaled(module, factor):
    twin = copy.deepcopy(module)
    twin.load_state_dict({name: tensor * factor for name, tensor in module.state_dict().items()})
    return twin


# --- where inputs come from ----------------------------------------------------------------------


class _Both(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x += 1
        return x, x * y


@eager_and_filter_jit
def test_one_array_given_twice_is_two_arguments(jit):
    model, x = TorchModule(_Both()), from_torch(X)
    with unchanged(x):
        assert_trees_close(jit(lambda m, x: m(x, x))(model, x), (x + 1, (x + 1) * x))


@eager_and_filter_jit
def test_an_array_that_is_leaf_and_input(jit):
    model = TorchModule(module_of(_input_into_weight))
    weight = model.params["linear.weight"]
    with unchanged(model):
        y = jit(lambda m, x: m(x))(model, weight)
    assert_trees_close(y, weight @ weight.T + weight.sum(0), rtol=1e-4)


@eager_and_filter_jit
def test_numpy_inputs(jit):
    model, x = TorchModule(nn.ReLU(inplace=True)), np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4)
    with unchanged(x):
        assert_trees_close(jit(lambda m, x: m(x))(model, x), jnp.maximum(x, 0))


@pytest.mark.parametrize("donated", ["x", "model"])
def test_donation(donated):
    """What is donated is deleted; the rest stays, and torch's module too, whose memory the leaves share."""
    module = module_of(_clamp_weight)
    model, x = TorchModule(module), from_torch(X)
    kept, given = (x, model) if donated == "model" else (model, x)

    @functools.partial(eqx.filter_jit, donate="all-except-first")
    def step(kept, given):
        model, x = (given, kept) if donated == "model" else (kept, given)
        return model(x), jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, given)

    with unchanged(kept, torch_module=module):
        y, _ = jax.block_until_ready(step(kept, given))
    assert all(a.is_deleted() for a in jax.tree.leaves(given) if eqx.is_array(a))
    assert_trees_close(y, from_torch(run(module, X)))
