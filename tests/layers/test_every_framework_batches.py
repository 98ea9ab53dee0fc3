"""Batches of examples and ensembles of models, in every framework."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import TiedAutoencoder
from frameworks import eager_and_jit, every_framework
from module_reference import torch_gradients_of, weighted_sum
from stateful_layers import STATEFUL, assert_equal, buffers_of, by_torch, some
from torch import nn

pytestmark = [every_framework, pytest.mark.both_engines(every=4)]


def _make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


@pytest.fixture
def modules():
    return [_make() for _ in range(3)]


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def _by_torch(modules, x):
    return jnp.stack([from_torch(module(torchleaf.to_torch(x))) for module in modules])


# --- examples ------------------------------------------------------------------------------------


@eager_and_jit
def test_gradients_of_each_example(framework, jit, x):
    """vmap over grad: a gradient for each example, as in torch one by one."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model = framework(module)

    def of_one(model, row):
        grads = model.gradients(lambda m, row: (weighted_sum(m(row)), None), row)
        return grads.weights.params, grads.inputs

    each = model.maybe_jit(lambda m, x: m.vmap(of_one)(x), jit=jit)(x)
    expected = [torch_gradients_of(module, module, (torchleaf.to_torch(row),), {}) for row in x]
    assert_trees_close(each, jax.tree.map(lambda *rows: jnp.stack(rows), *expected), rtol=1e-4, atol=1e-5)


@some
@eager_and_jit
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_state_shared_by_a_batch_is_refused(framework, spec, jit, method, engine):
    """Batch statistics need the whole batch; the error says what to do."""
    if engine == "xla" and spec is STATEFUL["spectral_norm"]:
        pytest.skip("its new state does not depend on the examples")
    model = framework(spec.make(), with_state=True, vmap_method=method)
    with pytest.raises(torchleaf.StateError, match=r"share the state.*on the whole batch outside"):
        model.maybe_jit(lambda m, xs: m.vmap(lambda m, x: m(x))(xs), jit=jit)(jnp.ones((5, *spec.shape)))


# --- ensembles -----------------------------------------------------------------------------------


def test_leaves_are_stacked(framework, modules):
    models = [framework(m) for m in modules]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m.weights for m in models))
    assert_equal(framework.stack(models).weights, expected)


@eager_and_jit
def test_vmapped_ensemble_computes_as_its_members(framework, jit, modules, x):
    ensemble = framework.stack([framework(m) for m in modules])
    ys = ensemble.maybe_jit(lambda e, x: e.vmap_members(lambda m, x: m(x))(x), jit=jit)(x)
    assert_trees_close(ys, _by_torch(modules, x))


@eager_and_jit
def test_gradients_of_an_ensemble_are_those_of_its_members(framework, jit, modules, x):
    ensemble = framework.stack([framework(m) for m in modules])

    def loss(ensemble, x):
        return (ensemble.vmap_members(lambda m, x: m(x))(x) ** 2).sum(), None

    grads = ensemble.maybe_jit(lambda e, x: e.gradients(loss, x), jit=jit)(x).weights.params
    for i, module in enumerate(modules):
        (module(torchleaf.to_torch(x)) ** 2).sum().backward()
        expected = {name: from_torch(p.grad) for name, p in module.named_parameters()}
        assert_trees_close(jax.tree.map(lambda g: g[i], grads), expected)


def test_members_and_examples_batch_together(framework, modules, rng):
    """vmap over members of vmap over examples, each member with examples of its own."""
    ensemble = framework.stack([framework(m) for m in modules])
    xs = jnp.asarray(rng.normal(size=(3, 5, 3)), jnp.float32)
    ys = ensemble.vmap_members(lambda m, x: m.vmap(lambda m, row: m(row[None])[0])(x), in_axes=0)(xs)
    expected = [from_torch(m(torchleaf.to_torch(x))) for m, x in zip(modules, xs, strict=True)]
    assert_trees_close(ys, jnp.stack(expected))


def test_tied_weights_stack_as_one_leaf(framework):
    modules = [TiedAutoencoder(5, 3) for _ in range(2)]
    ensemble, ids = framework.stack([framework(m) for m in modules]), torch.arange(5)
    ys = ensemble.vmap_members(lambda m, ids: m(ids))(from_torch(ids))
    assert_trees_close(ys, jnp.stack([from_torch(m(ids)) for m in modules]))
    assert {name: leaf.shape for name, leaf in ensemble.weights.params.items()} == {
        "embed.weight": (2, 5, 3),
        "project.bias": (2, 5),
    }


def test_one_model_is_an_ensemble_of_one(framework, modules, x):
    ys = framework.stack([framework(modules[0])]).vmap_members(lambda m, x: m(x))(x)
    assert_trees_close(ys, _by_torch(modules[:1], x))


@some
@eager_and_jit
@pytest.mark.filterwarnings("ignore:vmap of (ParametrizedLinear|Cache)")  # they run as a loop
def test_members_have_state_of_their_own(framework, spec, jit):
    modules, inputs = [spec.make() for _ in range(2)], spec.inputs(2)
    ensemble = framework.stack([framework(m, with_state=True) for m in modules])
    step = ensemble.maybe_jit(lambda e, x: e.vmap_members(lambda m, x: m(x))(x), jit=jit)
    ys = [step(from_torch(x)) for x in inputs]
    for i, module in enumerate(modules):
        expected = by_torch(module, inputs)
        actual = ([y[i] for y in ys], {name: b[i] for name, b in ensemble.weights.buffers.items()})
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_gradients_and_state_of_members_with_inputs_of_their_own(framework):
    modules, xs = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3)], torch.randn(3, 6, 3)
    ensemble = framework.stack([framework(m, with_state=True) for m in modules])

    def of_one(model, x):
        return model.gradients(lambda m, x: (weighted_sum(m(x)), None), x).weights.params

    grads = ensemble.jit(lambda e, xs: e.vmap_members(of_one, in_axes=0)(xs))(from_torch(xs))
    for i, module in enumerate(modules):
        expected, _ = torch_gradients_of(module, module, (xs[i],), {})
        assert_trees_close({n: g[i] for n, g in grads.items()}, expected, rtol=1e-4, atol=1e-4)
        assert_trees_close({n: b[i] for n, b in ensemble.weights.buffers.items()}, buffers_of(module))
