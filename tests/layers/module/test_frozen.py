"""What is frozen, what is tied, and what an optimizer does to each: as in torch, and as the guide says."""

import copy
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import TiedAutoencoder
from module_reference import torch_gradients_of, weighted_sum
from samples import raw_bytes
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
DOCS = Path(__file__).parents[3]
residual_modes = pytest.mark.parametrize("residuals", ["live", "recompute"])


def names(module):
    return [name for name, _ in module.named_parameters()]


def assert_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)


# --- frozen parameters -------------------------------------------------------------------------------


def mlp(*frozen, depth=4):
    """A chain of linear layers, of which those numbered `frozen` do not require grad."""
    module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)))
    for i in frozen:
        module[i].requires_grad_(False)
    return module


@pytest.mark.parametrize("frozen", [(), (0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_gradients_are_of_the_others(frozen):
    """`frozen` leaves have zero gradients, the others torch's."""
    module, x = mlp(*frozen), torch.randn(5, 8)
    expected, _ = torch_gradients_of(module, module, (x,), {}) if len(frozen) < 4 else ({}, None)
    model = torchleaf.TorchModule(module)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: weighted_sum(m(from_torch(x)))))(model)
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-5)
    assert_equal(grads.frozen, jax.tree.map(jnp.zeros_like, model.frozen))
    assert len(grads.frozen) == 2 * len(frozen)


@pytest.mark.torch_engine  # torch's ops are counted
@residual_modes
@pytest.mark.parametrize(("frozen", "products", "tanhs"), [((), 7, 4), ((0,), 5, 3), ((0, 1, 2), 1, 1), ((3,), 6, 4)])
def test_frozen_parameters_cost_no_backward(frozen, products, tanhs, residuals, backward):
    """Matrix products as in torch: one for each trained weight, one for each activation above the lowest of them."""
    model, x = torchleaf.TorchModule(mlp(*frozen), residuals=residuals), jnp.ones((5, 8))
    model.module.stand_alone()  # others are built alike, whose calls are replayed already
    jax.block_until_ready(eqx.filter_jit(eqx.filter_grad(lambda m: weighted_sum(m(x))))(model))
    assert (backward.matmuls, backward.counts["tanh_backward"]) == (products, tanhs)


def test_frozen_parameters_keep_no_activations():
    """What the backward pass of a trained head needs, the live graph keeps; of the frozen body below, nothing."""
    kept = []

    class Body(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept.append(any(ctx.needs_input_grad))
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            raise AssertionError("the frozen body has no backward pass")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(Body.apply(self.body(x)))

    model = torchleaf.TorchModule(Model())
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: m(jnp.ones((5, 8))).sum()))(model)
    assert bool(jnp.any(grads.params["head.weight"] != 0))
    assert not kept[-1]


@pytest.mark.torch_engine  # torch's ops are counted
def test_forward_mode_leaves_frozen_parameters_out():
    """Tangents of trained parameters alone reach torch."""
    module, x = mlp(0), jnp.ones((5, 8))
    model = torchleaf.TorchModule(module)
    params, static = eqx.partition(model, torchleaf.trainable(model))

    def output(params):
        return eqx.combine(params, static)(x)

    jaxpr = jax.make_jaxpr(lambda params: jax.jvp(output, (params,), (params,)))(params)
    calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "torch_call"]
    floats = [sum(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars) for eqn in calls]
    assert floats == [9, 9 + 6]


# --- tied weights ------------------------------------------------------------------------------------


def test_tied_weights_are_one_leaf_with_the_summed_gradient():
    module, ids = TiedAutoencoder(5, 3), torch.tensor([0, 3, 3, 1])
    model = torchleaf.TorchModule(module)
    assert sorted(model.params) == ["embed.weight", "project.bias"]
    expected, _ = torch_gradients_of(module, module, (ids,), {})
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: weighted_sum(m(from_torch(ids)))))(model)
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-5)

    untied = copy.deepcopy(module)
    untied.project.weight = nn.Parameter(untied.project.weight.detach().clone())
    each = eqx.filter_grad(lambda m: weighted_sum(m(from_torch(ids))))(torchleaf.TorchModule(untied)).params
    assert_trees_close(grads.params["embed.weight"], each["embed.weight"] + each["project.weight"], rtol=1e-4)


def test_tied_weights_stay_tied_through_training():
    """Adam with weight decay steps a tied weight once, as torch's does."""
    module, ids = TiedAutoencoder(5, 3), torch.tensor([0, 3, 3, 1])
    model = torchleaf.TorchModule(module, copy=True)
    optimizer, torch_optimizer = (
        optax.adamw(0.1, weight_decay=0.1),
        torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.1),
    )
    model = trained(model, optimizer, lambda m: jnp.mean(m(from_torch(ids)) ** 2), steps=5)
    for _ in range(5):
        torch_optimizer.zero_grad()
        module(ids).square().mean().backward()
        torch_optimizer.step()
    assert_trees_close(model.params, {n: from_torch(p) for n, p in module.named_parameters()}, rtol=1e-4, atol=1e-4)
    exported = torchleaf.to_torch_module(model)
    assert exported.project.weight is exported.embed.weight


# --- optimizers --------------------------------------------------------------------------------------


def trained(model, optimizer, loss, steps):
    """As the guide has it."""
    params, static = eqx.partition(model, torchleaf.trainable(model))
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, opt_state):
        grads = jax.grad(lambda params: loss(eqx.combine(params, static)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return eqx.combine(params, static)


PAGES = {"README.md": "model", "docs/quickstart.md": "eqx.combine(params, static)", "docs/weights.md": "trained"}


@pytest.mark.torch_engine  # pages as they are
@pytest.mark.long
@pytest.mark.parametrize(("page", "result"), PAGES.items(), ids=PAGES)
def test_the_documented_recipe_leaves_the_rest_bit_identical(page, result, tmp_path, monkeypatch):
    """The code of the page, word for word, on modules of which part is frozen and that have buffers of every kind."""
    monkeypatch.chdir(tmp_path)
    made = []

    class Watched(torchleaf.TorchModule):
        """Its last parameter frozen, and buffers beside it, before it is wrapped."""

        def __init__(self, module, **options):
            list(module.parameters())[-1].requires_grad_(False)
            module.register_buffer("_scale", torch.randn(3))
            module.register_buffer("_count", torch.tensor(7))
            super().__init__(module, **options)
            made.append((self, constants(self)))

    monkeypatch.setattr(torchleaf, "TorchModule", Watched)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    recipe = next(i for i, block in enumerate(blocks) if "optax.adamw" in block)
    namespace: dict[str, object] = {}
    source = "\n".join(blocks[: recipe + 1])
    for line in re.findall(r"^assert (?:losses|list|not).*\n", source, re.MULTILINE):
        source = source.replace(line, "")  # about how well the whole model learns, and what is in it
    exec(compile(source, page, "exec"), namespace)
    leaves = jax.tree.leaves(eval(result, namespace), is_leaf=lambda node: isinstance(node, Watched))
    after = [node for node in leaves if isinstance(node, Watched)]
    assert len(after) == 1
    assert constants(after[0]) == made[-1][1]
    assert len(made[-1][1]) >= 3
    assert any(raw_bytes(a) != raw_bytes(made[-1][0].params[name]) for name, a in after[0].params.items())


def constants(model):
    """The bits of what must not move."""
    return {name: raw_bytes(leaf) for name, leaf in {**model.frozen, **model.buffers}.items()}


def test_state_and_frozen_parameters_under_weight_decay():
    """With the buffers in an eqx.nn.State the optimizer never sees them: only the forward changes them."""
    module = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.BatchNorm1d(8), nn.Linear(8, 1))
    module.register_buffer("constant", torch.randn(4))
    twin = copy.deepcopy(module)
    model, state = eqx.nn.make_with_state(lambda: torchleaf.TorchModule(module))()
    frozen, constant = {n: raw_bytes(p) for n, p in model.frozen.items()}, raw_bytes(module.constant)
    optimizer, x = optax.adamw(1e-2, weight_decay=0.5), torch.randn(6, 8)
    params, static = eqx.partition(model, torchleaf.trainable(model))
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, opt_state, state):
        def loss(params):
            y, new_state = eqx.combine(params, static)(from_torch(x), state=state)
            return jnp.mean(y**2), new_state

        grads, state_after = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, state_after

    for _ in range(3):
        params, opt_state, state = step(params, opt_state, state)
        twin(x)  # the inputs of its BatchNorm do not depend on what is trained
    model = eqx.combine(params, static)
    assert {n: raw_bytes(p) for n, p in model.frozen.items()} == frozen
    buffers = state.get(model.buffer_index)
    assert raw_bytes(buffers["constant"]) == constant
    assert_trees_close(buffers, {n: from_torch(b) for n, b in twin.named_buffers()})


# --- a learning rate per parameter -------------------------------------------------------------------

RATES = {"0.0.weight": 0.5, "0.0.bias": 0.25, "1.0.weight": 0.125, "1.0.bias": 0.0}


def by_multi_transform():
    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key, params)

    return optax.multi_transform({name: optax.sgd(rate) for name, rate in RATES.items()}, labels)


def by_masks():
    def only(name):
        return lambda params: jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key == name, params)

    scales = [optax.masked(optax.scale(-rate), only(name)) for name, rate in RATES.items()]
    return optax.chain(*scales)


def by_torch(module):
    parameters = dict(module.named_parameters())
    return torch.optim.SGD([{"params": [parameters[name]], "lr": rate} for name, rate in RATES.items()], lr=1.0)


@pytest.mark.parametrize("make", [by_multi_transform, by_masks])
def test_a_learning_rate_for_each_torch_name(make):
    """optax.multi_transform and masks against torch's parameter groups; torch's names are the labels."""
    module, x = mlp(depth=2), torch.randn(5, 8)
    assert names(module) == list(RATES)
    model = torchleaf.TorchModule(module, copy=True)
    after = trained(model, make(), lambda m: jnp.mean(m(from_torch(x)) ** 2), steps=5)
    optimizer = by_torch(module)
    for _ in range(5):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    assert_trees_close(after.params, {n: from_torch(p) for n, p in module.named_parameters()}, rtol=1e-4)
    assert_equal(after.params["1.0.bias"], model.params["1.0.bias"])


@pytest.mark.long
@pytest.mark.parametrize("make", [by_multi_transform, by_masks])
def test_rates_within_a_larger_model(make):
    """The torch part has its own optimizer, the JAX part another."""

    class Model(eqx.Module):
        torch: torchleaf.TorchModule
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(self.torch(x))

    model = Model(torchleaf.TorchModule(mlp(depth=2)), eqx.nn.Linear(8, 1, key=jax.random.key(0)))

    def part(params):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].name, params)

    optimizer = optax.multi_transform({"torch": make(), "head": optax.sgd(1e-3)}, part)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    after = trained(model, optimizer, lambda m: jnp.mean(jax.vmap(m)(xs) ** 2), steps=1)
    grads = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(xs) ** 2))(model)
    moved = {name: (model.torch.params[name] - after.torch.params[name]) for name in RATES}
    expected = {name: rate * grads.torch.params[name] for name, rate in RATES.items()}
    assert_trees_close(moved, expected, rtol=1e-3, atol=1e-6)
    assert_trees_close(model.head.weight - after.head.weight, 1e-3 * grads.head.weight, rtol=1e-2, atol=1e-6)
