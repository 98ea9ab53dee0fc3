"""Backward passes that run the module again find the weights of their own call, in every framework and transform."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch, repeated_jit
from frameworks import EquinoxModel, every_framework
from module_reference import torch_gradients_of, weighted_sum
from reentering_layers import REENTERING, Checkpointed, Recomputing
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchleaf import RandomnessError, TorchCallError, TorchModule
from torchleaf.interop.calls.residuals import live_graphs
from untouched import unchanged

X = torch.linspace(-1.5, 2, 12).reshape(4, 3)
every_module = pytest.mark.parametrize("make", REENTERING.values(), ids=REENTERING)


def _scaled(model, factor):
    return model.replaced({name: factor * leaf for name, leaf in model.weights.all.items()})


def _assert_torchs(gradients, module, model, x=X):
    """Gradients of `weighted_sum` are torch's, with the model's weights."""
    twin = model.to_torch()
    weights, (inputs,) = torch_gradients_of(twin, twin, (x,), {})
    assert_trees_close(gradients.weights.params, weights)
    assert_trees_close(gradients.inputs[0], inputs)


@every_module
@every_framework
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_gradients(framework, make, residuals):
    module, x = make(), from_torch(X)
    model = framework(module, residuals=residuals, copy=True)
    with unchanged(model.weights, torch_module=module):
        for factor in (1, -0.5):
            scaled = _scaled(model, factor)
            gradients = scaled.gradients(lambda m, x: (weighted_sum(m(x)), None), x)
            _assert_torchs(gradients, module, scaled)


@every_module
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_compiled_gradients_at_each_run(make, residuals):
    """Two calls in one program, whose backward passes come in the opposite order."""
    model, x = TorchModule(make(), residuals=residuals), from_torch(X)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = repeated_jit(jax.grad(lambda p, x: weighted_sum((lambda m: m(m(x)))(eqx.combine(p, static)))))
    for factor in (1, 0.5):
        given = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        twin = torchleaf.to_torch_module(eqx.combine(given, static))
        expected, _ = torch_gradients_of(lambda x, twin=twin: twin(twin(x)), twin, (X,), {})
        assert_trees_close(step(given, x).params, expected)
    assert live_graphs() == 0


@pytest.mark.long
@every_module
def test_vmap(make):
    """Of gradients, of each example; and the gradient of a vmap."""
    model, x = TorchModule(make()), from_torch(X)[:, None]
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(p, x):
        return weighted_sum(eqx.combine(p, static)(x))

    expected = [torch_gradients_of(m := torchleaf.to_torch_module(model), m, (row[None],), {})[0] for row in X]
    with pytest.warns(UserWarning, match="runs as a loop"):
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, x)
    for i, of_one in enumerate(expected):
        assert_trees_close({name: leaf[i] for name, leaf in each.params.items()}, of_one)
    summed = jax.grad(lambda p: jax.vmap(loss, in_axes=(None, 0))(p, x).sum())(params)
    assert_trees_close(summed.params, {n: sum(of_one[n] for of_one in expected) for n in expected[0]})


@pytest.mark.long
@every_module
def test_members_of_an_ensemble(make):
    """Each has weights of its own while its backward pass runs."""
    model, x = EquinoxModel(make(), vmap_method="loop"), from_torch(X)
    models = [_scaled(model, factor) for factor in (1, 0.5)]
    params = eqx.filter(EquinoxModel.stack(models).model, eqx.is_inexact_array)
    _, static = eqx.partition(model.model, eqx.is_inexact_array)

    def loss(p):
        return jax.vmap(lambda p: weighted_sum(eqx.combine(p, static)(x)))(p).sum()

    grads = jax.grad(loss)(params)
    for i, member in enumerate(models):
        twin = member.to_torch()
        expected, _ = torch_gradients_of(twin, twin, (X,), {})
        assert_trees_close({name: leaf[i] for name, leaf in grads.params.items()}, expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_second_derivatives_of_checkpoints(jit):
    module = Checkpointed()
    model = TorchModule(module)
    x = X[:1]

    def torch_loss(x):
        return (module(x) ** 2).sum()

    expected = torch.autograd.functional.hessian(torch_loss, x)

    def loss(x):
        return (model(x) ** 2).sum()

    assert_trees_close(jit(jax.hessian(loss))(from_torch(x)), from_torch(expected), rtol=1e-4, atol=1e-5)
    reverse_twice = jit(jax.jacrev(jax.grad(loss)))(from_torch(x))
    assert_trees_close(reverse_twice, from_torch(expected), rtol=1e-4, atol=1e-5)


@every_module
@every_framework
def test_gradients_by_inputs_alone(framework, make):
    """The weights are constants of JAX's, and require gradients for torch as ever."""
    module, x = make(), from_torch(X)
    model = framework(module)
    for jit in (lambda f: f, jax.jit):
        gradient = jit(jax.grad(lambda x: weighted_sum(model.replaced({})(x))))(x)
        assert_trees_close(gradient, torch_gradients_of(module, module, (X,), {})[1][0])


TWICE = ["checkpoint", "nested checkpoints", "segments", "functional", "backward hook", "hook of a tensor"]


@pytest.mark.parametrize("name", TWICE)
def test_forward_mode(name):
    """By reverse mode twice, where backward passes can be differentiated."""
    model, x = TorchModule(REENTERING[name]()), from_torch(X)
    primal, tangent = jax.jvp(model, (x,), (jnp.cos(x),))
    _, pullback = jax.vjp(model, x)
    (transposed,) = pullback(jnp.sin(1 + primal))
    assert_trees_close((tangent * jnp.sin(1 + primal)).sum(), (jnp.cos(x) * transposed).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_graphs_do_not_keep_skeletons_or_memory():
    """A hundred steps, of which half have backward passes that never come."""
    model, x = TorchModule(Recomputing()), from_torch(X)
    model.module.stand_alone()
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, x: weighted_sum(m(x))))
    first = gradient(model, x)
    pool = model.module._pools[True] if True in model.module._pools else model.module._pools[False]
    for _ in range(50):
        last = gradient(model, x)
        jax.vjp(model, x)  # dropped
    assert_trees_close(first, last, rtol=0, atol=0)
    assert live_graphs() == 0
    assert len(pool._free) <= 4


class _Reentrant(Checkpointed):
    def forward(self, x):
        return checkpoint(self.first, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch's own
@every_framework
def test_reentrant_checkpoints_are_refused_where_gradients_are_wanted(framework):
    """torch would leave out the weights: the remedy that the message names works."""
    module, x = _Reentrant(), from_torch(X)
    model = framework(module)
    assert_trees_close(model(x), from_torch(module.first(X)))
    with pytest.raises(TorchCallError, match=r"_Reentrant .*use_reentrant=True.*Pass `use_reentrant=False`"):
        model.gradients(lambda m, x: (weighted_sum(m(x)), None), x)
    with pytest.raises(TorchCallError, match="use_reentrant=True"):
        jax.jvp(TorchModule(module), (x,), (x,))


class _Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return checkpoint(lambda y: nn.functional.dropout(self.linear(y)), x, use_reentrant=False)


def test_random_numbers_in_checkpoints_are_refused():
    with pytest.raises(RandomnessError, match=r"torch\.utils\.checkpoint"):
        TorchModule(_Dropping())(from_torch(X), key=jax.random.key(0))
