"""The NNX `TorchModule` under NNX's transforms, its optimizers, inside bigger models, and across `nnx.bridge`."""

import copy

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from flax import linen, nnx
from fresh_process import run_python
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
Buffer, Frozen, TorchModule = torchleaf.nnx.Buffer, torchleaf.nnx.Frozen, torchleaf.nnx.TorchModule

X = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)), jnp.float32)
Y = jnp.sum(X, axis=1, keepdims=True)

modes = pytest.mark.parametrize(
    "mode",
    [{}, {"graph": True, "graph_updates": False}, {"graph": False}],
    ids=["graph updates", "graph", "tree"],
)
"""NNX's three ways through a model."""


def _network(*, dropout: float = 0.0) -> nn.Module:
    """A frozen layer, running statistics, dropout and a layer to train."""
    module = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Sequential(nn.Tanh(), nn.Linear(4, 1))
    )
    module[0].requires_grad_(False)
    return module


def _pure(model: nnx.Module, *filters) -> dict:
    return nnx.to_pure_dict(nnx.state(model, *(filters or (nnx.Not(nnx.RngState),))))


def _torch_tree(tensors: dict[str, torch.Tensor]) -> dict:
    """Torch's names, nested as NNX does."""
    return nnx.traversals.unflatten_mapping({tuple(name.split(".")): from_torch(t) for name, t in tensors.items()})


def _torch_gradients(module: nn.Module) -> dict:
    module(torch.tensor(np.asarray(X))).square().sum().backward()
    return _torch_tree({name: p.grad for name, p in module.named_parameters() if p.requires_grad})


def _loss(model: nnx.Module) -> jax.Array:
    return jnp.sum(model(X) ** 2)


def _stacked(models: list[nnx.Module]) -> nnx.Module:
    """One model whose Variables have a leading axis."""
    graphdef, _ = nnx.split(models[0])
    return nnx.merge(graphdef, jax.tree.map(lambda *xs: jnp.stack(xs), *map(nnx.state, models)))


# --- jit, grad -----------------------------------------------------------------------------------


@modes
def test_jit_updates_buffers_and_streams(mode):
    module = _network(dropout=0.5)
    compiled, eager = (TorchModule(copy.deepcopy(module), rngs=nnx.Rngs(0)) for _ in range(2))
    call = nnx.jit(lambda model, x: model(x), **mode)
    for _ in range(3):
        assert_trees_close(call(compiled, X), eager(X), rtol=1e-4)
    assert_trees_close(_pure(compiled), _pure(eager))
    assert compiled.rngs.count[...] == eager.rngs.count[...] == 3
    assert compiled[1].num_batches_tracked[...] == 3


def test_one_compilation_for_models_of_one_graph():
    model, traces = TorchModule(_network()), []

    @nnx.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    call(model, X)
    call(nnx.clone(model), X)
    torchleaf.load_state_dict(model, _network().state_dict())
    call(model, X)
    assert len(traces) == 1
    model.eval()
    call(model, X)
    assert len(traces) == 2


def test_cached_partial():
    model, plain = (TorchModule(_network(), copy=True) for _ in range(2))
    torchleaf.load_state_dict(plain, torchleaf.state_dict(model))
    call = nnx.cached_partial(nnx.jit(lambda model, x: model(x)), model)
    for _ in range(2):
        assert_trees_close(call(X), plain(X), rtol=1e-4)
    assert_trees_close(_pure(model), _pure(plain))


@pytest.mark.parametrize("defaults", [{"hijax": True}, {"ref": True}], ids=str)
def test_other_kinds_of_variables(defaults):
    """Inside JAX's transformations, Flax reads variables of hijax, and since 0.12.12 refuses to update them."""
    module = _network()
    with nnx.var_defaults(**defaults):
        model = TorchModule(module)
    before = copy.deepcopy(module)
    if "hijax" in defaults:
        evaluated = jax.jit(lambda model, x: model(x, deterministic=True))(model, X)
        expected = copy.deepcopy(module).eval()(torch.tensor(np.asarray(X)))
        assert_trees_close(evaluated, from_torch(expected), rtol=1e-4)
    output = model(X) if "hijax" in defaults else nnx.jit(lambda m, x: m(x))(model, X)
    assert_trees_close(output, from_torch(before(torch.tensor(np.asarray(X)))), rtol=1e-4)
    buffers = {name: jnp.asarray(model[1][name][...]) for name in ("running_mean", "num_batches_tracked")}
    assert_trees_close(buffers, {name: from_torch(getattr(before[1], name)) for name in buffers})
    assert module[1].num_batches_tracked == 0


def test_donated_models_leave_torch_memory_alone():
    module = _network()
    before, model = copy.deepcopy(module.state_dict()), TorchModule(module)
    weight = model[3][1].weight[...]

    @nnx.jit(donate_argnums=0)
    def step(model):
        nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), nnx.grad(_loss)(model)))

    step(model)
    assert weight.is_deleted()
    assert_trees_close(from_torch(dict(module.state_dict())), from_torch(dict(before)), rtol=0, atol=0)
    assert not jnp.array_equal(model[3][1].weight[...], from_torch(before["3.1.weight"]))


@pytest.mark.long
def test_intermediates_are_captured():
    """In a process of its own: `nnx.capture` changes the classes it meets for good."""
    run_python(
        """
        import jax.numpy as jnp
        import torch
        import torchleaf
        from flax import nnx

        class Model(nnx.Module):
            def __init__(self):
                self.encoder = torchleaf.nnx.TorchModule(torch.nn.Linear(3, 4))
                self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.head(self.encoder(x))

        model, x = Model(), jnp.ones((5, 3))
        output, captured = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
        assert jnp.allclose(captured["encoder"]["__call__"].get_value()[0], model.encoder(x))
        assert jnp.allclose(model.head(model.encoder(x)), output)
        """
    )


def test_a_module_is_taken_apart_once_as_long_as_it_is_the_same():
    module = _network(dropout=0.5)
    graphdef = nnx.graphdef(TorchModule(module))
    assert nnx.graphdef(TorchModule(module, copy=True)) == graphdef
    assert nnx.graphdef(TorchModule(copy.deepcopy(module))) == graphdef
    assert nnx.graphdef(TorchModule(_network(dropout=0.25))) != graphdef
    assert nnx.graphdef(TorchModule(module, residuals="recompute")) != graphdef
    module[2].p = 0.0
    assert nnx.graphdef(TorchModule(module)) != graphdef
    assert jnp.all(TorchModule(module[2])(X) == X)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_gradients_of_params_agree_with_torch(jit):
    module = _network()
    model = TorchModule(copy.deepcopy(module))
    value, grads = jit(lambda model: nnx.value_and_grad(_loss)(model))(model)
    assert_trees_close(nnx.to_pure_dict(grads), _torch_gradients(module), rtol=1e-4, atol=1e-5)
    assert value > 0
    assert_trees_close(_pure(model, nnx.BatchStat), _torch_tree(dict(module.named_buffers())))
    # Once more: the updated statistics do not matter in training.
    again = jit(lambda model: nnx.grad(_loss)(model))(model)
    assert_trees_close(nnx.to_pure_dict(again), nnx.to_pure_dict(grads), rtol=1e-4)


def _value_and_grad(loss, model, wrt, mode):
    """`nnx.value_and_grad`, which outside of graph updates takes no filters: what it differentiates is split off."""
    if not mode:
        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    graphdef, params, rest = nnx.split(model, wrt, ...)

    @nnx.value_and_grad(**mode)
    def of_params(params, rest):
        return loss(nnx.merge(graphdef, params, rest))

    return of_params(params, rest)


@modes
def test_gradients_by_filter(mode):
    module = _network()
    model = TorchModule(copy.deepcopy(module))
    value, grads = _value_and_grad(_loss, model, nnx.All(nnx.Param, nnx.PathContains("3")), mode)
    assert_trees_close(nnx.to_pure_dict(grads), {"3": _torch_gradients(module)["3"]}, rtol=1e-4, atol=1e-5)
    assert value > 0
    assert_trees_close(_pure(model, nnx.BatchStat), _torch_tree(dict(module.named_buffers())))


def test_no_gradient_flows_to_frozen_parameters_and_buffers():
    module = _network().eval()
    model = TorchModule(module)
    constants = nnx.Any(Frozen, nnx.All(nnx.BatchStat, lambda path, _: path[-1] != "num_batches_tracked"))
    grads = nnx.grad(_loss, argnums=nnx.DiffState(0, constants))(model)
    assert_trees_close(grads, jax.tree.map(jnp.zeros_like, nnx.state(model, constants)), rtol=0)


def test_freezing_and_unfreezing_by_type():
    module = _network()
    model = TorchModule(module, copy=True)
    model[0].weight = nnx.Param(model[0].weight[...])
    model[3][1].bias = Frozen(model[3][1].bias[...])
    grads = nnx.grad(_loss)(model)
    module[0].weight.requires_grad_(True)
    module[3][1].bias.requires_grad_(False)
    assert_trees_close(nnx.to_pure_dict(grads), _torch_gradients(module), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_pure_function():
    module = _network()
    expected = _torch_gradients(copy.deepcopy(module))
    graphdef, params, rest = nnx.split(TorchModule(module), nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return _loss(model), nnx.state(model, nnx.BatchStat)

    grads, statistics = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_trees_close(nnx.to_pure_dict(grads), expected, rtol=1e-4, atol=1e-5)
    assert statistics["1"]["num_batches_tracked"][...] == 1
    assert rest["1"]["num_batches_tracked"][...] == 0


@pytest.mark.usefixtures("each_remat")
@modes
def test_remat(mode):
    plain, rematerialised = (TorchModule(_network(dropout=0.5), copy=True, rngs=nnx.Rngs(0)) for _ in range(2))
    torchleaf.load_state_dict(rematerialised, torchleaf.state_dict(plain))
    call = nnx.remat(lambda model, x: model(x), **mode)
    expected = nnx.grad(_loss)(plain)
    grads = nnx.grad(lambda model: jnp.sum(call(model, X) ** 2))(rematerialised)
    assert_trees_close(grads, expected, rtol=1e-4)
    assert_trees_close(_pure(rematerialised), _pure(plain))
    assert rematerialised.rngs.count[...] == 1


@modes
@pytest.mark.parametrize("training", [True, False])
def test_cond(mode, training):
    model, plain = (TorchModule(_network(dropout=0.5), copy=True, rngs=nnx.Rngs(0)) for _ in range(2))
    torchleaf.load_state_dict(plain, torchleaf.state_dict(model))

    @nnx.jit(**mode)
    def call(model, training, x):
        return nnx.cond(
            training, lambda m, x: m(x, deterministic=False), lambda m, x: m(x, deterministic=True), model, x, **mode
        )

    assert_trees_close(call(model, training, X), plain(X, deterministic=not training), rtol=1e-4)
    assert model.rngs.count[...] == model[1].num_batches_tracked[...] == int(training)


def test_changes_that_nnx_cannot_carry_out_are_its_own_error():
    model = TorchModule(_network())
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate BatchStat"):
        jax.jit(lambda x: model(x))(X)
    assert model[1].num_batches_tracked[...] == 0
    model.eval()
    assert_trees_close(jax.jit(lambda x: model(x))(X), model(X), rtol=1e-4)


def test_missing_variables():
    model = TorchModule(_network())
    statistics = nnx.pop(model, nnx.BatchStat)
    with pytest.raises(TypeError, match=r"Variable '1.running_mean' is missing.*nnx.update"):
        model(X)
    nnx.update(model, statistics)
    assert model(X).shape == (16, 1)


# --- vmap and scan -------------------------------------------------------------------------------


@modes
def test_ensembles(mode):
    modules = [_network() for _ in range(3)]
    ensemble = _stacked([TorchModule(m) for m in modules])
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None), **mode)(ensemble, X)
    x = torch.tensor(np.asarray(X))
    assert_trees_close(outputs, jnp.stack([from_torch(m(x)) for m in modules]), rtol=1e-4)
    for i, module in enumerate(modules):
        member = nnx.merge(nnx.graphdef(ensemble), jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(ensemble)))
        assert_trees_close(_pure(member), _torch_tree(module.state_dict()))


def test_stacked_variables_outside_of_vmap():
    with pytest.raises(torchleaf.TorchCallError, match=r"'0.weight' has shape \(3, 4, 3\).*is \(4, 3\).*nnx.vmap"):
        _stacked([TorchModule(_network()) for _ in range(3)])(X)


def test_ensembles_train():
    modules = [_network() for _ in range(3)]
    ensemble = _stacked([TorchModule(m) for m in modules])
    grads = nnx.vmap(nnx.grad(_loss))(ensemble)
    expected = [_torch_gradients(m) for m in modules]
    assert_trees_close(
        nnx.to_pure_dict(grads), jax.tree.map(lambda *xs: jnp.stack(xs), *expected), rtol=1e-4, atol=1e-5
    )


def test_members_draw_from_streams_of_their_own():
    members = [TorchModule(nn.Dropout(0.5), rngs=nnx.Rngs(i)) for i in range(3)]
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(_stacked(members), X)
    assert_trees_close(outputs, jnp.stack([m(X) for m in members]), rtol=0)


def test_parts_of_a_model_are_batched_by_state_axes():
    """One network, examples in a batch, a stream for each example."""
    model, plain = (
        TorchModule(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), rngs=nnx.Rngs(0), copy=True) for _ in "ab"
    )
    torchleaf.load_state_dict(plain, torchleaf.state_dict(model))
    axes = nnx.StateAxes({nnx.RngState: 0, ...: None})
    call = nnx.split_rngs(splits=16)(nnx.vmap(lambda model, x: model(x), in_axes=(axes, 0)))
    keys = nnx.clone(plain).rngs.split(16).key[...]
    expected = jnp.stack([plain(x, rngs=nnx.RngStream(key, tag="dropout")) for x, key in zip(X, keys, strict=True)])
    assert_trees_close(call(model, X), expected, rtol=1e-5)
    assert model.rngs.count.shape == ()


def test_examples_cannot_each_change_shared_statistics():
    model = TorchModule(nn.BatchNorm1d(3))
    axes = nnx.StateAxes({...: None})
    with pytest.raises(torchleaf.StateError, match="the examples share the state"):
        nnx.vmap(lambda model, x: model(x), in_axes=(axes, 0))(model, jnp.ones((5, 16, 3)))
    model.eval()
    assert nnx.vmap(lambda model, x: model(x), in_axes=(axes, 0))(model, jnp.ones((5, 16, 3))).shape == (5, 16, 3)


@modes
def test_scan_over_stacked_layers(mode):
    modules = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(4)]
    layers = _stacked([TorchModule(m, copy=True) for m in modules])

    @nnx.jit(**mode)
    def call(layers, x):
        scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)
        return scanned(x, layers)

    expected = torch.tensor(np.asarray(X))
    output = call(layers, X)
    for module in modules:
        expected = module(expected)
    assert_trees_close(output, from_torch(expected), rtol=1e-3, atol=1e-5)
    statistics = jax.tree.map(lambda *xs: jnp.stack(xs), *[_torch_tree(dict(m.named_buffers())) for m in modules])
    assert_trees_close(_pure(layers, nnx.BatchStat), statistics, rtol=1e-4, atol=1e-5)


def test_gradients_through_scan():
    modules = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)]
    layers = _stacked([TorchModule(m) for m in modules])

    def loss(layers):
        y = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, layers)
        return jnp.sum(y**2)

    nn.Sequential(*modules)(torch.tensor(np.asarray(X))).square().sum().backward()
    expected = [_torch_tree({name: p.grad for name, p in m.named_parameters()}) for m in modules]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *expected)
    assert_trees_close(nnx.to_pure_dict(nnx.grad(loss)(layers)), expected, rtol=1e-4, atol=1e-5)


def test_scan_over_batches_carries_statistics():
    module = _network()
    model = TorchModule(module, copy=True)
    batches = jnp.stack([X, 2 * X, X - 1])

    @nnx.scan(in_axes=(nnx.StateAxes({...: nnx.Carry}), 0), out_axes=0)
    def call(model, x):
        return model(x)

    outputs = call(model, batches)
    expected = [from_torch(module(torch.tensor(np.asarray(x)))) for x in batches]
    assert_trees_close(outputs, jnp.stack(expected), rtol=1e-4)
    assert_trees_close(_pure(model), _torch_tree(module.state_dict()))


# --- training ------------------------------------------------------------------------------------


class _Model(nnx.Module):
    """A torch encoder with a head of NNX."""

    def __init__(self, module: nn.Module, rngs: nnx.Rngs):
        self.encoder = TorchModule(module, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.encoder(x))


class _TorchModel(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def _encoder() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4))
    module[0].requires_grad_(False)
    return module


def _slow(path: tuple, _) -> str:
    return "slow" if path[0] == "encoder" else "fast"


OPTIMIZERS = {
    "adamw": (
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    ),
    "two rates": (
        lambda: optax.multi_transform(
            {"slow": optax.sgd(1e-3), "fast": optax.sgd(1e-1)},
            lambda params: nnx.map_state(_slow, params),
        ),
        lambda m: torch.optim.SGD(
            [{"params": m.encoder.parameters(), "lr": 1e-3}, {"params": m.head.parameters()}], 1e-1
        ),
    ),
}


@modes
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_agrees_with_torch(optimizer, mode):
    make_optax, make_torch = optimizer
    reference = _TorchModel(_encoder())
    model = _Model(copy.deepcopy(reference.encoder), nnx.Rngs(0))
    model.head.kernel[...] = from_torch(reference.head.weight.T.contiguous())
    model.head.bias[...] = from_torch(reference.head.bias)
    frozen = _pure(model, Frozen)
    optimizer, torch_optimizer = nnx.Optimizer(model, make_optax(), wrt=nnx.Param), make_torch(reference)

    @nnx.jit(**mode)
    def step(model, optimizer, x, y):
        value, grads = _value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2), model, nnx.Param, mode)
        optimizer.update(model, grads)
        return value

    for i in range(10):
        x, y = X + 0.1 * i, Y
        torch_optimizer.zero_grad()
        loss = nn.functional.mse_loss(reference(torch.tensor(np.asarray(x))), torch.tensor(np.asarray(y)))
        loss.backward()
        torch_optimizer.step()
        assert_trees_close(step(model, optimizer, x, y), from_torch(loss), rtol=1e-3, atol=1e-5)
    assert_trees_close(_pure(model.encoder), _torch_tree(reference.encoder.state_dict()), rtol=1e-3, atol=1e-5)
    assert_trees_close(_pure(model, Frozen), frozen, rtol=0, atol=0)
    assert list(torchleaf.state_dict(model.encoder)) == list(reference.encoder.state_dict())


def test_weight_decay_leaves_frozen_parameters_and_buffers_alone():
    model = TorchModule(_network().eval(), copy=True)
    before, params = _pure(model, nnx.Not(nnx.Param)), _pure(model, nnx.Param)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(_loss)(model))
    assert_trees_close(_pure(model, nnx.Not(nnx.Param)), before, rtol=0, atol=0)
    changed = jax.tree.map(lambda a, b: not jnp.array_equal(a, b), params, _pure(model, nnx.Param))
    assert all(jax.tree.leaves(changed))


# --- nnx.bridge ----------------------------------------------------------------------------------


def test_to_linen():
    module = _network(dropout=0.5)
    bridged = nnx.bridge.to_linen(TorchModule, module)
    variables = bridged.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    assert set(variables) == {"params", "frozen", "batch_stats"}
    assert set(variables["params"]) == {"1", "3"}
    assert_trees_close(variables["params"]["1"]["weight"], jnp.ones(4))
    variables = {**variables, "batch_stats": _torch_tree(dict(module.named_buffers()))}
    apply = jax.jit(bridged.apply, static_argnames=("mutable", "deterministic"))
    # `deterministic` and dropout's key are those of the call
    assert_trees_close(
        apply(variables, X, deterministic=True),
        from_torch(copy.deepcopy(module).eval()(torch.tensor(np.asarray(X)))),
        rtol=1e-4,
    )
    draws = [apply(variables, X, rngs={"dropout": jax.random.key(i)}, mutable=("batch_stats",)) for i in (0, 0, 1)]
    assert_trees_close(draws[0], draws[1], rtol=0)
    assert not jnp.array_equal(draws[0][0], draws[2][0])
    module(torch.tensor(np.asarray(X)))
    assert_trees_close(draws[0][1]["batch_stats"], _torch_tree(dict(module.named_buffers())))


def test_to_linen_inside_a_linen_model():
    module = _network()

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(nnx.bridge.to_linen(TorchModule, module, name="torch")(x))

    model = Model()
    variables = model.init(jax.random.key(0), X)
    assert set(variables["params"]) == {"torch", "Dense_0"}

    def loss(params):
        y, _ = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(y**2)

    assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.any(g != 0)), jax.jit(jax.grad(loss))(variables["params"])))


def test_from_linen():
    module = _network(dropout=0.5)
    model = nnx.bridge.ToNNX(torchleaf.linen.TorchModule(module), rngs=nnx.Rngs(0)).lazy_init(X)
    native = TorchModule(module, rngs=nnx.Rngs(0))
    assert {path: type(v) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))} == {
        path: type(v) for path, v in nnx.to_flat_state(nnx.state(native, nnx.Not(nnx.RngState)))
    }
    native.eval()
    assert_trees_close(_pure(model), _pure(native))
