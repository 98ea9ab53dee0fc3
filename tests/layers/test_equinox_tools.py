"""Everything Equinox and JAX do to modules, done to torch modules and to models that hold them."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


def _torch_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture
def mlp():
    """A torch MLP and the model that wraps it."""
    module = _torch_mlp()
    return module, torchleaf.TorchModule(module)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


class Classifier(eqx.Module):
    """A JAX head on a torch encoder."""

    encoder: torchleaf.TorchModule
    head: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, encoder: torch.nn.Module):
        self.encoder = torchleaf.TorchModule(encoder)
        self.head = eqx.nn.Linear(4, 2, key=jax.random.key(0))
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        return self.head(self.dropout(self.encoder(x), key=key))


class _Doubling(nn.Module):
    """Doubles while training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if self.training else 1.0)


@eager_and_filter_jit
def test_value_and_grad_as_torch(jit, mlp, x):
    module, model = mlp
    value, grads = jit(eqx.filter_value_and_grad(lambda m, x: (m(x) ** 2).mean()))(model, x)
    loss = (module(torchleaf.to_torch(x)) ** 2).mean()
    loss.backward()
    assert_trees_close(value, from_torch(loss))
    assert_trees_close(grads.params, {name: from_torch(p.grad) for name, p in module.named_parameters()})
    assert isinstance(grads, torchleaf.TorchModule)


def test_in_sequential_with_equinox_layers(mlp, x):
    module, model = mlp
    head = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    sequential = eqx.nn.Sequential([model, eqx.nn.Lambda(jax.nn.relu), head])
    expected = jax.vmap(head)(jax.nn.relu(from_torch(module(torchleaf.to_torch(x)))))
    assert_trees_close(eqx.filter_jit(eqx.filter_vmap(sequential))(x), expected)
    assert_trees_close(jax.vmap(lambda x: sequential(x, key=jax.random.key(1)))(x), expected)


@eager_and_filter_jit
def test_filter_vmap_over_inputs(jit, mlp, x):
    module, model = mlp
    assert_trees_close(jit(eqx.filter_vmap(model))(x), from_torch(module(torchleaf.to_torch(x))))


def test_filter_vmap_over_stacked_params(x):
    modules = [_torch_mlp() for _ in range(3)]
    models = [torchleaf.TorchModule(m) for m in modules]
    stacked = eqx.tree_at(
        lambda m: m.params, models[0], jax.tree.map(lambda *w: jnp.stack(w), *(m.params for m in models))
    )
    ys = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(stacked, x)
    assert_trees_close(ys, jnp.stack([from_torch(m(torchleaf.to_torch(x))) for m in modules]))


def test_scan_over_stacked_layers(x):
    """Many layers of one shape, scanned as Equinox's guide does for deep models."""
    modules = [nn.Linear(3, 3) for _ in range(4)]
    layers = torchleaf.stack([torchleaf.TorchModule(m) for m in modules])
    dynamic, static = eqx.partition(layers, eqx.is_array)

    def loss(dynamic):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(eqx.combine(layer, static)(h)), None), x, dynamic)[0].sum()

    expected = torchleaf.to_torch(x)
    for module in modules:
        expected = torch.tanh(module(expected))
    expected.sum().backward()
    value, grads = jax.jit(jax.value_and_grad(loss))(dynamic)
    assert_trees_close(value, from_torch(expected.sum()), rtol=1e-4)
    assert_trees_close(grads.params["weight"], jnp.stack([from_torch(m.weight.grad) for m in modules]))


def test_tree_at_replaces_one_leaf(mlp, x):
    module, model = mlp
    changed = eqx.tree_at(lambda m: m.params["2.bias"], model, replace_fn=lambda b: b + 1)
    assert_trees_close(changed(x), model(x) + 1)
    assert_trees_close(model.params["2.bias"], from_torch(module[2].bias))


def test_partition_and_combine(mlp, x):
    _, model = mlp
    dynamic, static = eqx.partition(model, eqx.is_array)
    assert len(jax.tree.leaves(dynamic)) == 4
    assert not any(eqx.is_array(leaf) for leaf in jax.tree.leaves(static))
    y = jax.jit(lambda d, x: eqx.combine(d, static)(x))(dynamic, x)
    assert_trees_close(y, model(x))


def test_serialisation_round_trip(x):
    saved, other = Classifier(_torch_mlp()), Classifier(_torch_mlp())
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, other)
    assert_trees_close(loaded.encoder.params, saved.encoder.params, rtol=0, atol=0)
    assert_trees_close(loaded.encoder(x), saved.encoder(x), rtol=0, atol=0)
    assert not jnp.allclose(other.encoder(x), saved.encoder(x))


def test_inference_mode_of_a_module_and_of_a_model_that_holds_it(x):
    model = torchleaf.TorchModule(_Doubling())
    assert_trees_close(model(x), 2 * x)
    assert_trees_close(eqx.nn.inference_mode(model)(x), x)
    assert_trees_close(eqx.nn.inference_mode(eqx.nn.inference_mode(model), value=False)(x), 2 * x)
    holder = Classifier(_Doubling())
    switched = eqx.nn.inference_mode(holder)
    assert switched.encoder.inference
    assert switched.dropout.inference
    assert not holder.encoder.inference
    assert_trees_close(switched.encoder(x), x)


def test_inference_mode_keeps_submodules_that_were_set_apart(x):
    """A frozen batch norm inside a module in training mode, as in fine-tuning."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].eval()
    assert module.training
    model = torchleaf.TorchModule(module)
    assert_trees_close(model(x), from_torch(module(torchleaf.to_torch(x))))


def test_traced_inference_flag_is_refused(mlp, x):
    _, model = mlp
    with pytest.raises(TypeError, match=r"Sequential: `inference` is traced.*eqx\.filter_jit"):
        jax.jit(lambda m, x: m(x))(model, x)


def test_pformat_is_short_and_shows_no_weights(mlp):
    _, model = mlp
    text = eqx.tree_pformat(model)
    assert "'0.weight': f32[8,3]" in text
    assert "inference=False" in text
    assert len(text.splitlines()) < 15
    assert str(float(model.params["0.weight"][0, 0]))[:6] not in text
    assert "[" not in repr(model.module)


def test_tree_map_reaches_every_leaf(mlp, x):
    module, model = mlp
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, model)
    assert not jnp.any(zeros(x))
    assert len(jax.tree.leaves(eqx.filter(model, eqx.is_array))) == len(list(module.parameters()))


def test_tree_equal(mlp):
    module, model = mlp
    assert eqx.tree_equal(model, jax.tree.map(lambda leaf: leaf, model))
    assert not eqx.tree_equal(model, eqx.tree_at(lambda m: m.params["2.bias"], model, replace_fn=lambda b: b + 1))
    assert eqx.tree_equal(model, torchleaf.TorchModule(module))
    assert not eqx.tree_equal(model, torchleaf.TorchModule(module, vmap_method="loop"))


def test_filter_eval_shape_and_make_jaxpr(mlp, x, engine):
    _, model = mlp
    y = eqx.filter_eval_shape(model, x)
    assert (y.shape, y.dtype) == ((5, 4), jnp.float32)
    jaxpr = eqx.filter_make_jaxpr(model)(x)[0]
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns].count("torch_call") == (engine == "torch")


@pytest.mark.usefixtures("each_remat")
def test_filter_checkpoint(mlp, x):
    _, model = mlp
    plain = eqx.filter_grad(lambda m: (m(x) ** 2).sum())(model)
    checkpointed = eqx.filter_grad(lambda m: (eqx.filter_checkpoint(m)(x) ** 2).sum())(model)
    assert_trees_close(checkpointed, plain)


def test_filter_jit_with_donation_leaves_torch_alone(mlp, x):
    module, _ = mlp
    before = [p.detach().clone() for p in module.parameters()]
    model = torchleaf.TorchModule(module)
    step = eqx.filter_jit(lambda m: jax.tree.map(lambda w: w - 1 if eqx.is_inexact_array(w) else w, m), donate="all")
    changed = step(model)
    assert_trees_close(changed.params["2.bias"], from_torch(before[-1] - 1))
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_gradients_of_a_mixed_model_as_torch(x):
    """A torch encoder below a JAX head, against the same head written in torch."""
    encoder = _torch_mlp()
    model = eqx.nn.inference_mode(Classifier(encoder))
    head = nn.Linear(4, 2)
    with torch.no_grad():
        head.weight.copy_(torchleaf.to_torch(model.head.weight))
        head.bias.copy_(torchleaf.to_torch(model.head.bias))
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, x: (jax.vmap(m)(x) ** 2).mean()))(model, x)
    (head(encoder(torchleaf.to_torch(x))) ** 2).mean().backward()
    assert_trees_close(grads.encoder.params, {n: from_torch(p.grad) for n, p in encoder.named_parameters()})
    assert_trees_close((grads.head.weight, grads.head.bias), from_torch((head.weight.grad, head.bias.grad)))


def test_hessian_vector_product_of_the_weights(mlp, x):
    module, model = mlp
    direction = jax.tree.map(jnp.ones_like, model.params)

    def gradient(params):
        return jax.grad(lambda p: (eqx.tree_at(lambda m: m.params, model, p)(x) ** 2).sum())(params)

    _, product = jax.jvp(gradient, (model.params,), (direction,))
    params = list(module.parameters())
    grads = torch.autograd.grad((module(torchleaf.to_torch(x)) ** 2).sum(), params, create_graph=True)
    expected = torch.autograd.grad(sum(g.sum() for g in grads), params)
    names = [name for name, _ in module.named_parameters()]
    assert_trees_close(product, dict(zip(names, map(from_torch, expected), strict=True)), rtol=1e-4, atol=1e-4)
