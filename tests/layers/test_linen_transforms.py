"""The Linen `TorchModule` as a part of Linen models, and under Linen's transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from flax.training.train_state import TrainState
from torch import nn as tnn

pytestmark = pytest.mark.both_engines(every=4)
TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class InSetup(nn.Module):
    encoder: tnn.Module

    def setup(self):
        self.torch, self.head = TorchModule(self.encoder), nn.Dense(2)

    def __call__(self, x, train=False):
        return self.head(self.torch(x, train=train))

    def hidden(self, x):
        return self.torch.call("forward", x, train=False)


class InCompact(nn.Module):
    encoder: tnn.Module

    @nn.compact
    def __call__(self, x, train=False):
        x = TorchModule(self.encoder, name="torch")(x, train=train)
        return nn.Dense(2, name="head")(x)


class AsField(nn.Module):
    torch: nn.Module

    def setup(self):
        self.head = nn.Dense(2)

    def __call__(self, x, train=False):
        return self.head(self.torch(x, train=train))


def _encoder() -> tnn.Module:
    return tnn.Sequential(tnn.Linear(3, 4), tnn.BatchNorm1d(4), tnn.Dropout(0.5))


# --- in models ---------------------------------------------------------------------------------


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize(
    "make", [InSetup, InCompact, lambda module: AsField(TorchModule(module))], ids=["setup", "compact", "field"]
)
def test_submodules(make, jit, rng):
    module, x = _encoder(), _normal(rng, 5, 3)
    model = make(module)
    variables = jit(model.init)(KEY, x)
    assert {col: sorted(tree) for col, tree in variables.items()} == {
        "params": ["head", "torch"],
        "batch_stats": ["torch"],
    }
    assert variables["params"]["torch"].keys() == {"0", "1"}
    y = jit(model.apply)(variables, x)
    hidden = torchleaf.to_jax(module.eval()(torchleaf.to_torch(x)))
    assert_trees_close(y, nn.Dense(2).apply({"params": variables["params"]["head"]}, hidden))

    def train(variables, key):
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    (one, updates), (again, _), (other, _) = (jit(train)(variables, k) for k in (KEY, KEY, jax.random.key(1)))
    assert_trees_close(one, again, rtol=0, atol=0)
    assert not jnp.array_equal(one, other)
    assert int(updates["batch_stats"]["torch"]["1"]["num_batches_tracked"]) == 1


def test_a_compact_method_takes_its_torch_module_apart_once(rng):
    module, x, copies = tnn.Linear(3, 4), _normal(rng, 5, 3), []

    class Counted(tnn.Identity):
        def __deepcopy__(self, memo):
            copies.append(1)
            return Counted()

    model = InCompact(tnn.Sequential(module, Counted()))
    variables = model.init(KEY, x)
    model.apply(variables, x)
    made = len(copies)
    for _ in range(3):
        model.apply(variables, x)
    assert len(copies) == made


def test_one_module_called_twice_shares_its_weights(rng):
    module, x = tnn.Linear(3, 3), _normal(rng, 5, 3)

    class Twice(nn.Module):
        def setup(self):
            self.layer = TorchModule(module)

        def __call__(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    variables = model.init(KEY, x)
    assert variables["params"].keys() == {"layer"}
    grads = jax.grad(lambda v: model.apply(v, x).sum())(variables)["params"]["layer"]
    module(module(torchleaf.to_torch(x))).sum().backward()
    assert_trees_close(grads, {name: from_torch(p.grad) for name, p in module.named_parameters()})


def test_statistics_of_two_calls_add_up(rng):
    x = _normal(rng, 5, 3)

    class Twice(nn.Module):
        def setup(self):
            self.norm = TorchModule(tnn.BatchNorm1d(3))

        def __call__(self, x):
            return self.norm(self.norm(x))

    _, updates = Twice().apply(Twice().init(KEY, x), x, mutable=["batch_stats"])
    assert int(updates["batch_stats"]["norm"]["num_batches_tracked"]) == 2


def test_bind_and_unbind(rng):
    module, x = tnn.Linear(3, 4), _normal(rng, 5, 3)
    model = InSetup(module)
    variables = model.init(KEY, x)
    bound = model.bind(variables)
    assert_trees_close(bound(x), model.apply(variables, x))
    assert_trees_close(bound.hidden(x), bound.torch(x))
    encoder, inner = bound.torch.unbind()
    assert isinstance(encoder, TorchModule)
    assert encoder.scope is None
    assert encoder.made.module is bound.torch.made.module
    assert_trees_close(inner, {"params": variables["params"]["torch"]}, rtol=0, atol=0)
    assert_trees_close(encoder.apply(inner, x), from_torch(module(torchleaf.to_torch(x))))


def test_share_scope_puts_both_modules_variables_together(rng):
    """A low-rank adapter around a torch layer, as in Flax's documentation around its Dense."""
    module, x = tnn.Linear(3, 4), _normal(rng, 5, 3)

    class Adapted(nn.Module):
        base: TorchModule

        def setup(self):
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.normal(), (3, 2))
            b = self.param("b", nn.initializers.normal(), (2, 4))
            return self.base(x) + x @ a @ b

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Adapted(TorchModule(module, name="layer"))(x)

    variables = Model().init(KEY, x)
    params = variables["params"]["layer"]
    assert params.keys() == {"weight", "bias", "a", "b"}
    expected = from_torch(module(torchleaf.to_torch(x))) + x @ params["a"] @ params["b"]
    assert_trees_close(Model().apply(variables, x), expected)


def test_tabulate_counts_parameters():
    table = InSetup(_encoder()).tabulate(
        KEY, jnp.ones((5, 3)), compute_flops=True, console_kwargs={"force_terminal": False, "width": 200}
    )
    assert "TorchModule" in table
    assert "Total Parameters: 43" in table  # 24 and 9 statistics in torch's part, 10 in the head
    row = next(line for line in table.splitlines() if "│ TorchModule" in line)
    assert "float32[5,3]" in row
    assert "float32[5,4]" in row
    assert "running_mean: float32[4]" in table


def test_interceptors_and_captured_intermediates_see_the_call(rng):
    module, x = tnn.Linear(3, 4), _normal(rng, 5, 3)
    model = InSetup(module)
    _, state = model.apply(model.init(KEY, x), x, capture_intermediates=True, mutable=["intermediates"])
    (hidden,) = state["intermediates"]["torch"]["__call__"]
    assert_trees_close(hidden, from_torch(module(torchleaf.to_torch(x))))


def test_train_state_trains_as_torch_does(rng):
    module = tnn.Sequential(tnn.Linear(3, 8), tnn.Tanh(), tnn.Linear(8, 1))
    module[0].bias.requires_grad_(False)
    x, y = _normal(rng, 20, 3), _normal(rng, 20, 1)
    model = TorchModule(module, copy_weights=True)
    variables = model.init(KEY, x)
    rest = {"frozen": variables["frozen"]}
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adamw(1e-2, weight_decay=0.1))

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params, **rest}, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        state = step(state)
        optimizer.zero_grad()
        (module(torchleaf.to_torch(x)) - torchleaf.to_torch(y)).square().mean().backward()
        optimizer.step()
    trained = torchleaf.state_dict(model, {"params": state.params, **rest})
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)


# --- transformations ---------------------------------------------------------------------------


def _loss(model, rest):
    return lambda params, x: jnp.sum(jnp.sin(model.apply({"params": params, **rest}, x)))


@pytest.mark.usefixtures("each_remat")
@pytest.mark.parametrize("lift", [nn.jit, nn.remat, lambda cls: nn.remat(nn.jit(cls))], ids=["jit", "remat", "both"])
@eager_and_jit
def test_lifted_class_computes_the_same(lift, jit, rng):
    module, x = _encoder(), _normal(rng, 5, 3)
    model, lifted = TorchModule(module, train=False), lift(TorchModule)(module, train=False)
    variables = lifted.init(KEY, x)
    assert_trees_close(variables, model.init(KEY, x), rtol=0, atol=0)
    rest = {"batch_stats": variables["batch_stats"]}
    expected = jax.value_and_grad(_loss(model, rest))(variables["params"], x)
    assert_trees_close(jit(jax.value_and_grad(_loss(lifted, rest)))(variables["params"], x), expected)


@pytest.mark.usefixtures("each_remat")
@pytest.mark.parametrize("lift", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_state_and_randomness_go_through_lifted_classes(lift, rng):
    x = _normal(rng, 5, 3)

    class Model(nn.Module):
        layer: type

        @nn.compact
        def __call__(self, x):
            return self.layer(_MODULE, name="layer")(x)

    plain, lifted = Model(TorchModule), Model(lift(TorchModule))
    variables = plain.init(KEY, x)

    def loss(model, params):
        variables_now = {**variables, "params": params}
        y, updates = model.apply(variables_now, x, rngs={"dropout": KEY}, mutable=["batch_stats"])
        return jnp.sum(y**2), (y, updates)

    results = [
        jax.value_and_grad(lambda p, model=model: loss(model, p), has_aux=True)(variables["params"])
        for model in (plain, lifted)
    ]
    (_, (y, updates)), _ = results[1]
    assert jnp.any(y == 0)
    assert int(updates["batch_stats"]["layer"]["1"]["num_batches_tracked"]) == 1
    if lift is nn.remat:  # nn.jit folds the name of its own scope into the stream
        # Gradients of up to 12, of sums in another order: their rounding depends on the machine's vectors.
        assert_trees_close(results[1], results[0], atol=1.2e-5)


_MODULE = _encoder()


class Block(nn.Module):
    """A torch layer with the signature of a scan's body."""

    layer: tnn.Module
    initializer: object = None

    @nn.compact
    def __call__(self, x, _):
        return x + TorchModule(self.layer, initializer=self.initializer, name="torch")(x), None


def _scanned(layer, **options):
    scan = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )
    return scan(layer, **options)


@eager_and_jit
def test_scan_runs_a_stack_of_torch_layers(jit, rng):
    layers = [tnn.Sequential(tnn.Linear(4, 4), tnn.Tanh()) for _ in range(3)]
    x = _normal(rng, 5, 4)
    model = _scanned(layers[0])
    params = {"torch": _stack([TorchModule(layer).init(KEY, x)["params"] for layer in layers])}
    assert jax.tree.map(jnp.shape, model.init(KEY, x, None)["params"]) == jax.tree.map(jnp.shape, params)

    def loss(params):
        y, _ = model.apply({"params": params}, x, None)
        return jnp.sum(y**2), y

    grads, y = jit(jax.grad(loss, has_aux=True))(params)
    expected = torchleaf.to_torch(x)
    for layer in layers:
        expected = expected + layer(expected)
    expected.square().sum().backward()
    assert_trees_close(y, from_torch(expected))
    gradients = [{"0": {n: from_torch(p.grad) for n, p in layer[0].named_parameters()}} for layer in layers]
    assert_trees_close(grads, {"torch": _stack(gradients)}, rtol=1e-4, atol=1e-5)


def test_scan_keeps_state_and_random_numbers_of_each_layer(rng):
    model, x = _scanned(tnn.Sequential(tnn.BatchNorm1d(4), tnn.Dropout(0.5))), _normal(rng, 50, 4)
    variables = model.init(KEY, x, None)
    assert variables["batch_stats"]["torch"]["0"]["running_mean"].shape == (3, 4)
    (y, _), updates = model.apply(variables, x, None, rngs={"dropout": KEY}, mutable=["batch_stats"])
    means = updates["batch_stats"]["torch"]["0"]["running_mean"]
    assert_trees_close(means[0], 0.1 * x.mean(0))
    assert not jnp.array_equal(means[0], means[1])
    dropped = jnp.mean(y == x)  # where all three layers dropped
    assert 0.03 < float(dropped) < 0.3


@pytest.mark.long
@pytest.mark.parametrize("initializer", ["reset_parameters", nn.initializers.normal(1.0)], ids=["reset", "normal"])
def test_split_rngs_initialise_each_layer_of_a_scan(initializer):
    params = _scanned(tnn.Linear(4, 4), initializer=initializer).init(KEY, jnp.ones((5, 4)), None)["params"]["torch"]
    assert params["weight"].shape == (3, 4, 4)
    assert len({float(leaf[0, 0]) for leaf in params["weight"]}) == 3
    assert len({float(leaf[0]) for leaf in params["bias"]}) == 3


def _ensemble(module, size=3, *, in_axes=None, **options):
    lifted = nn.vmap(
        TorchModule,
        variable_axes={"params": 0, "frozen": 0, "batch_stats": 0, "buffers": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        axis_size=size,
    )
    return lifted(module, **options)


@eager_and_jit
def test_vmap_runs_an_ensemble(jit, rng):
    members = [tnn.Sequential(tnn.Linear(3, 4), tnn.Tanh(), tnn.Linear(4, 1)) for _ in range(3)]
    x = _normal(rng, 5, 3)
    model = _ensemble(members[0])
    params = _stack([TorchModule(member).init(KEY, x)["params"] for member in members])
    y, grads = jit(jax.value_and_grad(lambda p: model.apply({"params": p}, x).sum()))(params)
    outputs = [member(torchleaf.to_torch(x)) for member in members]
    sum(out.sum() for out in outputs).backward()
    assert_trees_close(model.apply({"params": params}, x), from_torch(torch.stack(outputs)))
    assert_trees_close(y, from_torch(torch.stack(outputs).sum()), rtol=1e-4)
    for i, member in enumerate(members):
        expected = {n: from_torch(p.grad) for n, p in member.named_parameters()}
        actual = {".".join(k.key for k in path): leaf[i] for path, leaf in jax.tree.leaves_with_path(grads)}
        assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@eager_and_jit
def test_split_rngs_initialise_each_member_of_an_ensemble(jit):
    module, x = tnn.Sequential(tnn.Linear(30, 40), tnn.BatchNorm1d(40)), jnp.ones((5, 30))
    model = _ensemble(module, initializer="reset_parameters")
    weights = jit(model.init)(KEY, x)["params"]["0"]["weight"]
    assert weights.shape == (3, 40, 30)
    assert not any(jnp.array_equal(weights[i], weights[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    bound = 1 / jnp.sqrt(30)
    assert 0.9 * bound < float(jnp.max(jnp.abs(weights))) <= bound
    same = _ensemble(module).init(KEY, x)["params"]["0"]["weight"]  # torch's weights in each
    assert_trees_close(same, jnp.broadcast_to(from_torch(module[0].weight), (3, 40, 30)), rtol=0, atol=0)


def test_members_of_an_ensemble_have_state_and_random_numbers_of_their_own(rng):
    module, x = tnn.Sequential(tnn.BatchNorm1d(4), tnn.Dropout(0.5)), _normal(rng, 3, 20, 4)
    model = _ensemble(module, in_axes=0)
    variables = model.init(KEY, x)
    y, updates = model.apply(variables, x, rngs={"dropout": KEY}, mutable=["batch_stats"])
    assert_trees_close(updates["batch_stats"]["0"]["running_mean"], 0.1 * x.mean(1))
    masks = y == 0
    assert not jnp.array_equal(masks[0], masks[1])


def test_ensemble_members_have_weights_in_torchs_terms(rng):
    module, x = tnn.Linear(3, 4), _normal(rng, 5, 3)
    variables = _ensemble(module, initializer="reset_parameters").init(KEY, x)
    member = jax.tree.map(lambda leaf: leaf[1], variables)
    plain = torchleaf.to_torch_module(TorchModule(module), member)
    assert_trees_close(from_torch(plain.weight), variables["params"]["weight"][1], rtol=0, atol=0)


# --- partitioning metadata -----------------------------------------------------------------------


def test_initialisers_box_parameters(rng):
    module, x = tnn.Sequential(tnn.Linear(3, 4), tnn.BatchNorm1d(4)), _normal(rng, 5, 3)
    initializer = {"0.weight": nn.with_partitioning(nn.initializers.lecun_normal(1, 0), ("model", None))}
    model = TorchModule(module, initializer=initializer)
    variables = model.init(KEY, x)
    spec = nn.get_partition_spec(variables)
    assert spec["params"]["0"] == {"weight": jax.P("model", None), "bias": jax.P()}
    plain = nn.meta.unbox(variables)
    assert_trees_close(model.apply(variables, x, train=False), model.apply(plain, x, train=False), rtol=0, atol=0)
    grads = jax.grad(lambda v: model.apply(v, x, train=False).sum(), allow_int=True)(variables)
    assert isinstance(grads["params"]["0"]["weight"], nn.Partitioned)
    state = torchleaf.state_dict(model, variables)
    assert_trees_close(from_torch(state["0.weight"]), plain["params"]["0"]["weight"], rtol=0, atol=0)
    loaded = torchleaf.load_state_dict(model, module.state_dict(), variables)
    assert loaded["params"]["0"]["weight"].names == ("model", None)
    assert_trees_close(nn.meta.unbox(loaded), TorchModule(module).init(KEY, x), rtol=0, atol=0)


def test_boxes_of_state_stay(rng):
    model, x = TorchModule(tnn.BatchNorm1d(4)), _normal(rng, 5, 4)
    variables = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), model.init(KEY, x))
    _, updates = model.apply(variables, x, mutable=["batch_stats"])
    assert updates["batch_stats"]["running_mean"].names == (None,)
    _, plain = model.apply(nn.meta.unbox(variables), x, mutable=["batch_stats"])
    assert_trees_close(nn.meta.unbox(updates), plain, rtol=0, atol=0)


@pytest.mark.long
def test_scan_names_the_axis_it_adds():
    scan = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    initializer = nn.with_partitioning(nn.initializers.normal(), ("model",))
    model = scan(tnn.Linear(4, 4), initializer=(("bias", initializer),))
    variables = model.init(KEY, jnp.ones((5, 4)), None)
    assert variables["params"]["torch"]["bias"].names == ("layers", "model")
    assert model.apply(variables, jnp.ones((5, 4)), None)[0].shape == (5, 4)
