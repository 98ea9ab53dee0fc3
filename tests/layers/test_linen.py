"""The Linen `TorchModule`: its variables, calls, state, random numbers, modes, methods and checkpoints."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.torch
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from custom_layers import Channels, TiedAutoencoder
from flax import errors, serialization
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, path_aware_map
from layer_catalogue import SPECS
from module_reference import snapshot, torch_gradients_of, weighted_sum
from torch import nn as tnn
from torch._subclasses.fake_tensor import FakeTensor

TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


def _mixed() -> tnn.Module:
    """Trainable and frozen parameters, statistics that are not the initial ones, dropout; in training mode."""
    module = tnn.Sequential(tnn.Linear(3, 4), tnn.BatchNorm1d(4), tnn.Dropout(0.5), tnn.Linear(4, 2))
    with torch.no_grad():
        module(torch.randn(8, 3))
    module[0].requires_grad_(False)
    return module


def _tensors(module: tnn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _by_torch_name(variables) -> dict[str, jax.Array]:
    return {".".join(path[1:]): leaf for path, leaf in flatten_dict(variables).items()}


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# --- variables -----------------------------------------------------------------------------------


def test_variables_nest_by_torch_names_in_collections():
    variables = TorchModule(_mixed()).init(KEY, jnp.ones((5, 3)))
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"1": {"weight": (4,), "bias": (4,)}, "3": {"weight": (2, 4), "bias": (2,)}},
        "frozen": {"0": {"weight": (4, 3), "bias": (4,)}},
        "batch_stats": {"1": {"running_mean": (4,), "running_var": (4,), "num_batches_tracked": ()}},
    }


def test_buffers_that_are_no_statistics_have_a_collection_of_their_own():
    variables = TorchModule(Channels(4)).init(KEY, jnp.ones((5, 4)))
    assert {col: sorted(tree) for col, tree in variables.items()} == {
        "params": ["weight"],
        "buffers": ["keep", "order", "scale"],
    }


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_init_gives_the_tensors_of_torch_and_its_output(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        before = snapshot(module)
        args, kwargs = spec.draw()
        inputs = from_torch((args, kwargs))
        output, variables = TorchModule(module, **spec.options).init_with_output(KEY, *inputs[0], **inputs[1])
        assert_trees_close(_by_torch_name(variables), from_torch(_tensors(module)), rtol=0, atol=0)
        assert snapshot(module) == before
        if spec.random == "never":
            assert_trees_close(output, from_torch(module(*args, **kwargs)), spec.tolerance, spec.tolerance)


@pytest.mark.parametrize(
    "module",
    [_mixed(), tnn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), Channels(3)],
    ids=["mixed", "channels_last", "buffers"],
)
def test_variables_share_memory_with_torch_unless_copied(module):
    x = jnp.ones((5, 3, 5, 5)) if isinstance(module, tnn.Conv2d) else jnp.ones((5, 3))
    views = _by_torch_name(TorchModule(module).init(KEY, x))
    copies = _by_torch_name(TorchModule(module, copy_weights=True).init(KEY, x))
    for name, tensor in _tensors(module).items():
        if tensor.dtype != torch.int64:  # int32 in JAX without x64
            assert views[name].unsafe_buffer_pointer() == tensor.data_ptr(), name
        assert copies[name].unsafe_buffer_pointer() != tensor.data_ptr(), name
    assert_trees_close(copies, views, rtol=0, atol=0)


def test_init_gives_the_weights_of_the_moment():
    module = tnn.Linear(3, 4)
    model = TorchModule(module)
    module.load_state_dict(tnn.Linear(3, 4).state_dict())
    params = model.init(KEY, jnp.ones(3))["params"]
    assert_trees_close(params, from_torch(dict(module.named_parameters())), rtol=0, atol=0)


@pytest.mark.parametrize(
    "how", [jax.jit, lambda f: f, "eval_shape", "lazy_init"], ids=["jit", "eager", "shape", "lazy"]
)
def test_ways_to_init(how):
    module, x = _mixed(), jnp.ones((5, 3))
    model = TorchModule(module)
    if how == "eval_shape":
        shapes = jax.eval_shape(model.init, KEY, x)
        assert_trees_close(jax.tree.map(jnp.zeros_like, shapes), jax.tree.map(jnp.zeros_like, model.init(KEY, x)))
        return
    init = model.lazy_init if how == "lazy_init" else how(model.init)
    given = jax.ShapeDtypeStruct(x.shape, x.dtype) if how == "lazy_init" else x
    assert_trees_close(_by_torch_name(init(KEY, given)), from_torch(_tensors(module)), rtol=0, atol=0)


def test_init_does_not_update_statistics():
    module = _mixed()
    variables = TorchModule(module).init(KEY, 5 * jnp.ones((5, 3)))
    assert_trees_close(variables["batch_stats"]["1"], from_torch(dict(module[1].named_buffers())), rtol=0, atol=0)


def test_tied_weights_are_one_variable():
    module = TiedAutoencoder(5, 3)
    model, ids = TorchModule(module), torch.arange(5)
    variables = model.init(KEY, from_torch(ids))
    assert jax.tree.map(jnp.shape, variables["params"]) == {"embed": {"weight": (5, 3)}, "project": {"bias": (5,)}}
    grads = jax.grad(lambda v: weighted_sum(model.apply(v, from_torch(ids))))(variables)
    expected, _ = torch_gradients_of(module, module, (ids,), {})
    assert_trees_close(_by_torch_name(grads), expected)


class _Clashing(tnn.Module):
    """Names that are attributes of a Linen module, or of this wrapper."""

    def __init__(self):
        super().__init__()
        self.name, self.module, self.scope = tnn.Linear(3, 3), tnn.Linear(3, 3), tnn.Linear(3, 3)
        self.params, self.parent = tnn.Parameter(torch.randn(3)), tnn.Parameter(torch.randn(3))
        self.register_buffer("variables", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.name(x) + self.module(x) * self.scope(x) + self.params * self.parent + self.variables


def test_torch_names_do_not_collide_with_those_of_linen(rng):
    module, x = _Clashing(), _normal(rng, 5, 3)

    class Model(nn.Module):
        def setup(self):
            self.inner = TorchModule(module)

        def __call__(self, x):
            return self.inner(x)

    output, variables = Model().init_with_output(KEY, x)
    assert_trees_close(output, from_torch(module(torchleaf.to_torch(x))))
    assert "name" in variables["params"]["inner"]
    assert_trees_close(Model().apply(variables, x), output)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda v: {}, errors.ScopeCollectionNotFound, "collection is empty"),
        (lambda v: {**v, "params": {"1": v["params"]["1"]}}, errors.ScopeVariableNotFoundError, '"3"'),
        (lambda v: {**v, "params": {**v["params"], "3": {}}}, errors.ScopeVariableNotFoundError, r'"3\.weight"'),
        (lambda v: {"params": v["params"]}, errors.ScopeCollectionNotFound, "frozen"),
        (
            lambda v: jax.tree.map(lambda x: x[None], v),
            errors.ScopeParamShapeError,
            r"shape \(4, 3\), but .* shape \(1, 4, 3\)",
        ),
    ],
    ids=["nothing", "no part", "empty part", "no collection", "shape"],
)
def test_variables_that_do_not_fit_are_refused_in_the_words_of_flax(broken, error, message):
    model, x = TorchModule(_mixed().eval()), jnp.ones((5, 3))
    with pytest.raises(error, match=message):
        model.apply(broken(model.init(KEY, x)), x)


def test_a_module_without_variables_cannot_be_called():
    with pytest.raises(errors.CallCompactUnboundModuleError):
        TorchModule(tnn.Linear(3, 4))(jnp.ones(3))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("given", [tnn.Linear, nn.Dense(3), "linear"], ids=["class", "linen", "string"])
def test_only_torch_modules_are_wrapped(given):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got"):
        TorchModule(given)


# --- calls ---------------------------------------------------------------------------------------


@eager_and_jit
def test_values_and_gradients(jit, rng):
    module = _mixed().eval()
    model, x = TorchModule(module), torch.randn(5, 3)
    variables = model.init(KEY, from_torch(x))
    assert_trees_close(jit(model.apply)(variables, from_torch(x)), from_torch(module(x)))
    grads, grad_x = jit(jax.grad(lambda v, x: weighted_sum(model.apply(v, x)), argnums=(0, 1), allow_int=True))(
        variables, from_torch(x)
    )
    expected, (expected_x,) = torch_gradients_of(module, module, (x,), {})
    assert_trees_close((_by_torch_name({"params": grads["params"]}), grad_x), (expected, expected_x))
    constants = {**_by_torch_name({"f": grads["frozen"]}), **_by_torch_name({"b": grads["batch_stats"]})}
    assert not any(jnp.any(g) for g in constants.values() if g.dtype != jax.dtypes.float0)


def test_dense_of_flax_computes_the_same(rng):
    module, x = tnn.Linear(3, 4), _normal(rng, 5, 3)
    model, dense = TorchModule(module), nn.Dense(4)
    variables = model.init(KEY, x)
    theirs = {"params": {"kernel": variables["params"]["weight"].T, "bias": variables["params"]["bias"]}}
    assert_trees_close(model.apply(variables, x), dense.apply(theirs, x))
    ours = jax.grad(lambda v: weighted_sum(model.apply(v, x)))(variables)["params"]
    grads = jax.grad(lambda v: weighted_sum(dense.apply(v, x)))(theirs)["params"]
    assert_trees_close(ours, {"weight": grads["kernel"].T, "bias": grads["bias"]})


def test_batch_norm_of_flax_computes_the_same(rng):
    x = 3 * _normal(rng, 50, 4) + 1
    model, norm = TorchModule(tnn.BatchNorm1d(4)), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    ours, theirs = model.init(KEY, x), norm.init(KEY, x, use_running_average=False)
    y, updates = model.apply(ours, x, train=True, mutable=["batch_stats"])
    expected, stats = norm.apply(theirs, x, use_running_average=False, mutable=["batch_stats"])
    assert_trees_close(y, expected, rtol=1e-4, atol=1e-5)
    assert updates.keys() == stats.keys()
    assert_trees_close(updates["batch_stats"]["running_mean"], stats["batch_stats"]["mean"])
    biased = (updates["batch_stats"]["running_var"] - 0.9) * 49 / 50 + 0.9  # torch keeps the unbiased variance
    assert_trees_close(biased, stats["batch_stats"]["var"])


def test_frozen_dicts_are_variables_too():
    model, x = TorchModule(_mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    y, updates = model.apply(freeze(variables), x, mutable=["batch_stats"], rngs={"dropout": KEY})
    expected = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    assert_trees_close((y, updates), expected, rtol=0, atol=0)


def test_options_reach_the_call(rng):
    x = _normal(rng, 3)
    reverse = TorchModule(tnn.Linear(3, 4), forward_mode=False)
    variables = reverse.init(KEY, x)
    assert jax.grad(lambda x: reverse.apply(variables, x).sum())(x).shape == (3,)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: reverse.apply(variables, x), (x,), (x,))
    changed = TorchModule(tnn.Linear(3, 4)).copy(forward_mode=False)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: changed.apply(variables, x), (x,), (x,))


def test_out_shape_option_serves_a_forward_that_reads_values(rng):
    class Checked(tnn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return {"y": super().forward(x)}

    module, x = Checked(3, 4), _normal(rng, 3)
    model = TorchModule(module, out_shape={"y": jax.ShapeDtypeStruct((4,), jnp.float32)})
    variables = model.init(KEY, x)
    assert hash(model) == hash(model.copy())
    assert_trees_close(jax.jit(model.apply)(variables, x), from_torch(module(torchleaf.to_torch(x))))


# --- one skeleton per torch module -------------------------------------------------------------


def test_clones_share_the_skeleton():
    model = TorchModule(tnn.Linear(3, 4))
    assert model.clone().made is model.made
    assert model.copy(name="encoder").made is model.made
    assert model == model.clone()
    assert hash(model) == hash(model.clone())


def test_a_torch_module_wrapped_again_is_known_again():
    module = _mixed()
    first = TorchModule(module).made.module
    with torch.no_grad():
        module(torch.randn(8, 3))  # other statistics
        module[3].weight.mul_(2)
    assert TorchModule(module).made.module is first
    assert TorchModule(module, residuals="recompute").made.module is not first
    assert TorchModule(copy.deepcopy(module)).made.module is not first


class _Configured(tnn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.activation = tnn.Linear(3, 3), torch.tanh
        self.scale, self.table, self.settings = 2.0, torch.ones(3), {"shift": [1.0]}
        self.config = type("Config", (), {})()
        self.config.power = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.linear(x)) * self.scale * self.table + self.settings["shift"][0]
        return y**self.config.power


def _set(path, value):
    def change(module):
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule("") if not owner else getattr(module, owner), name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("scale", 3.0),
        _set("activation", torch.sin),
        _set("linear", tnn.Linear(3, 3, bias=False)),
        _set("config.power", 2),
        lambda module: module.settings["shift"].__setitem__(0, 4.0),
        lambda module: module.table.mul_(3),
        lambda module: module.eval(),
        lambda module: module.linear.requires_grad_(False),
    ],
    ids=["number", "function", "submodule", "object", "container", "tensor", "mode", "frozen"],
)
def test_a_torch_module_that_has_changed_is_taken_apart_anew(change, rng):
    module, x = _Configured(), _normal(rng, 5, 3)
    first = TorchModule(module)
    change(module)
    again = TorchModule(module)
    assert again.made.module is not first.made.module
    output, variables = again.init_with_output(KEY, x)
    assert_trees_close(output, from_torch(module(torchleaf.to_torch(x))))
    assert ("frozen" in variables) is (not module.linear.weight.requires_grad)


# --- initialisers ------------------------------------------------------------------------------


def test_jax_initializer_makes_every_trainable_parameter():
    module, x = _mixed(), jnp.ones((5, 3))
    variables = TorchModule(module, initializer=nn.initializers.normal(10.0)).init(KEY, x)
    torch_variables = TorchModule(module).init(KEY, x)
    assert_trees_close(
        {**variables, "params": None}, {**torch_variables, "params": None}, rtol=0, atol=0
    )  # frozen parameters and statistics are torch's
    leaves = jax.tree.leaves(variables["params"])
    assert all(jnp.std(leaf) > 3 for leaf in leaves)
    assert len({float(leaf.ravel()[0]) for leaf in leaves}) == len(leaves)


def test_initializers_by_name():
    module = _mixed()
    model = TorchModule(module, initializer={"3.weight": nn.initializers.ones, "*.weight": nn.initializers.zeros})
    params = model.init(KEY, jnp.ones((5, 3)))["params"]
    assert_trees_close(params["3"]["weight"], jnp.ones((2, 4)))
    assert_trees_close(params["1"]["weight"], jnp.zeros(4))
    assert_trees_close(params["3"]["bias"], from_torch(module[3].bias), rtol=0, atol=0)


def test_initializers_see_shape_and_dtype():
    seen = []

    def initializer(key, shape, dtype):
        seen.append((jnp.issubdtype(key.dtype, jax.dtypes.prng_key), shape, dtype))
        return jnp.zeros(shape, dtype)

    TorchModule(tnn.Linear(3, 4, dtype=torch.bfloat16), initializer=initializer).init(KEY, jnp.ones(3, jnp.bfloat16))
    assert seen == [(True, (4, 3), jnp.bfloat16), (True, (4,), jnp.bfloat16)]


@pytest.mark.parametrize(
    ("initializer", "error", "message"),
    [
        ("kaiming", TypeError, "'reset_parameters'.*got 'kaiming'"),
        (3, TypeError, "got 3"),
        ({"0.*": nn.initializers.zeros}, ValueError, r"'0\.\*' fits none"),
    ],
)
def test_initializers_that_are_none(initializer, error, message):
    with pytest.raises(error, match=message):
        TorchModule(_mixed(), initializer=initializer).init(KEY, jnp.ones((5, 3)))


def _transformer():
    return tnn.Transformer(8, 2, 1, 1, 16, batch_first=True)


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (lambda: tnn.Linear(30, 40), (jnp.ones((5, 30)),)),
        (lambda: tnn.Sequential(tnn.Conv2d(3, 40, 3), tnn.BatchNorm2d(40)), (jnp.ones((2, 3, 5, 5)),)),
        (lambda: tnn.Embedding(100, 40, padding_idx=1), (jnp.arange(5),)),
        (lambda: tnn.LSTM(30, 40), (jnp.ones((5, 30)),)),
        (lambda: tnn.MultiheadAttention(32, 4), (jnp.ones((5, 32)),) * 3),
        (_transformer, (jnp.ones((2, 3, 8)),) * 2),
    ],
    ids=["Linear", "Conv-BatchNorm", "Embedding", "LSTM", "attention", "Transformer"],
)
@eager_and_jit
def test_reset_parameters_draws_from_the_distribution_of_torch(make, args, jit):
    module = make()
    with torch.no_grad():
        for tensor in _tensors(module).values():
            tensor.add_(100 if tensor.is_floating_point() else 7)
    model = TorchModule(module, initializer="reset_parameters")
    state, torch_generator = snapshot(module), torch.get_rng_state()
    init = jit(lambda key: model.init(key, *args))
    one, again, other = init(KEY), init(KEY), init(jax.random.key(1))
    assert torch.equal(torch.get_rng_state(), torch_generator)
    assert snapshot(module) == state
    assert_trees_close(one, again, rtol=0, atol=0)
    for name, tensor in _tensors(make()).items():
        ours, theirs = np.asarray(_by_torch_name(one)[name]), tensor.detach().numpy()
        constant = np.ptp(theirs) == 0
        if constant:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            assert not np.array_equal(ours, _by_torch_name(other)[name]), name
            assert ours.std() == pytest.approx(theirs.std(), rel=0.5), name
            assert abs(ours.mean() - theirs.mean()) < theirs.std(), name
    if isinstance(module, tnn.Embedding):
        assert not jnp.any(one["params"]["weight"][1])


def test_reset_parameters_leaves_what_is_frozen():
    module = tnn.Sequential(
        tnn.Linear(3, 4).requires_grad_(False), tnn.BatchNorm1d(4).requires_grad_(False), tnn.Linear(4, 2)
    )
    module(3 * torch.randn(8, 3))
    module[2].bias.requires_grad_(False)
    variables = _by_torch_name(TorchModule(module, initializer="reset_parameters").init(KEY, jnp.ones((5, 3))))
    for name, tensor in _tensors(module).items():
        assert jnp.array_equal(variables[name], from_torch(tensor)) == (name != "2.weight"), name


def test_reset_parameters_says_what_it_cannot_draw():
    class Prompted(tnn.Module):
        def __init__(self):
            super().__init__()
            self.prompt, self.linear = tnn.Parameter(torch.randn(3)), tnn.Linear(3, 4)
            tnn.utils.parametrizations.weight_norm(self.linear)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + self.prompt)

    module = Prompted()
    model = TorchModule(module, initializer="reset_parameters")
    with pytest.warns(UserWarning, match=r"draws `prompt`, `linear\.parametrizations\.weight\.original0`"):
        variables = model.init(KEY, jnp.ones(3))
    assert_trees_close(variables["params"]["prompt"], from_torch(module.prompt), rtol=0, atol=0)
    assert not jnp.array_equal(variables["params"]["linear"]["bias"], from_torch(module.linear.bias))


# --- state -------------------------------------------------------------------------------------


@eager_and_jit
def test_statistics_follow_those_of_torch(jit):
    module = tnn.Sequential(tnn.Linear(3, 4), tnn.BatchNorm1d(4), tnn.Linear(4, 2))
    model = TorchModule(copy.deepcopy(module), copy_weights=True)
    variables = model.init(KEY, jnp.ones((5, 3)))
    apply = jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))
    for _ in range(3):
        x = 2 * torch.randn(8, 3) + 1
        y, updates = apply(variables, from_torch(x))
        assert updates.keys() == {"batch_stats"}
        variables |= updates
        assert_trees_close(y, from_torch(module(x)))
        assert_trees_close(_by_torch_name(updates), from_torch(dict(module.named_buffers())))
    x = torch.randn(8, 3)
    assert_trees_close(model.apply(variables, from_torch(x), train=False), from_torch(module.eval()(x)))


class _Stateful(tnn.Module):
    """Statistics and another buffer that changes."""

    def __init__(self):
        super().__init__()
        self.norm = tnn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unused", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x) * self.calls


def test_every_collection_that_changes_has_to_be_mutable():
    model, x = TorchModule(_Stateful()), jnp.arange(12.0).reshape(4, 3)
    variables = model.init(KEY, x)
    assert float(variables["buffers"]["calls"]) == 0
    with pytest.raises(torchleaf.StateError, match=r'mutable=\["batch_stats", "buffers"\]'):
        model.apply(variables, x)
    with pytest.raises(torchleaf.StateError, match=r"`calls` .* 'buffers' is not mutable"):
        model.apply(variables, x, mutable=["batch_stats"])
    _, updates = model.apply(variables, x, mutable=["batch_stats", "buffers"])
    assert float(updates["buffers"]["calls"]) == 1
    assert jnp.array_equal(updates["buffers"]["unused"], variables["buffers"]["unused"])
    assert int(updates["batch_stats"]["norm"]["num_batches_tracked"]) == 1
    _, everything = model.apply(variables, x, mutable=True)
    assert everything.keys() == {"params", "batch_stats", "buffers"}


def test_evaluation_needs_nothing_mutable():
    model, x = TorchModule(_mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    assert model.apply(variables, x, train=False).shape == (5, 2)
    _, updates = model.apply(variables, x, train=False, mutable=["batch_stats"])
    assert_trees_close(updates["batch_stats"], variables["batch_stats"], rtol=0, atol=0)


# --- random numbers ----------------------------------------------------------------------------


@eager_and_jit
def test_dropout_draws_from_its_stream(jit):
    model, x = TorchModule(tnn.Dropout(0.5)), jnp.ones((50, 20))
    apply = jit(lambda key: model.apply({}, x, rngs={"dropout": key}))
    y, again, other = apply(KEY), apply(KEY), apply(jax.random.key(1))
    assert_trees_close(y, again, rtol=0, atol=0)
    assert not jnp.array_equal(y, other)
    assert set(np.unique(y)) == {0.0, 2.0}


def test_without_a_stream_the_error_names_it():
    model, x = TorchModule(_mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    with pytest.raises(torchleaf.RandomnessError, match=r'rngs=\{"dropout": key\}.*submodule `2` \(Dropout\)'):
        model.apply(variables, x, mutable=["batch_stats"])
    noisy = TorchModule(tnn.Dropout(0.5), rng_collection="noise")
    with pytest.raises(torchleaf.RandomnessError, match=r'rngs=\{"noise": key\}'):
        noisy.apply({}, x, rngs={"dropout": KEY})
    assert noisy.apply({}, x, rngs={"noise": KEY}).shape == x.shape


def test_params_stand_in_for_the_stream_as_in_flax():
    model, x = TorchModule(tnn.Dropout(0.5)), jnp.ones((5, 3))
    by_params = model.apply({}, x, rngs={"params": KEY})
    assert_trees_close(by_params, model.apply({}, x, rngs=KEY), rtol=0, atol=0)
    assert_trees_close(by_params, model.init_with_output(KEY, x)[0], rtol=0, atol=0)


def test_layers_draw_different_numbers_and_only_those_who_draw_move_the_stream():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            silent = TorchModule(tnn.Linear(3, 3), name="silent")
            dropout = TorchModule(tnn.Dropout(0.5), name="dropout")
            other = TorchModule(tnn.Dropout(0.5), name="other")
            silent(x)
            return dropout(x), dropout(x), other(x)

    x = jnp.ones((50, 3))
    variables = Model().init(KEY, x)
    one, two, three = Model().apply(variables, x, rngs={"dropout": KEY})
    assert not jnp.array_equal(one, two)
    assert not jnp.array_equal(one, three)

    class Dropouts(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = TorchModule(tnn.Sequential(tnn.Identity(), tnn.Dropout(0.5)), name="dropout")
            shared(x, train=False)
            return shared(x)

    assert_trees_close(Dropouts().apply({}, x, rngs={"dropout": KEY}), one, rtol=0, atol=0)


def test_a_torch_argument_named_key():
    module = tnn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    model, x = TorchModule(module), torch.randn(2, 4, 8)
    given = {"query": x, "key": 2 * x, "value": x}
    arrays = {name: from_torch(tensor) for name, tensor in given.items()}
    variables = model.init(KEY, **arrays)
    assert_trees_close(model.apply(variables, **arrays, train=False), from_torch(module.eval()(**given)))
    drawn = model.apply(variables, **arrays, rngs={"dropout": KEY})
    assert_trees_close(drawn, model.apply(variables, *arrays.values(), rngs={"dropout": KEY}), rtol=0, atol=0)


# --- train and deterministic -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "call", "training"),
    [
        ({}, {}, None),
        ({}, {"train": True}, True),
        ({}, {"train": False}, False),
        ({}, {"deterministic": True}, False),
        ({}, {"deterministic": False}, True),
        ({"train": True}, {}, True),
        ({"train": False}, {}, False),
        ({"deterministic": True}, {}, False),
        ({"deterministic": False}, {}, True),
        ({"deterministic": False}, {"train": True}, True),
        ({"train": False}, {"deterministic": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapped_in", [True, False], ids=["training", "evaluation"])
def test_modes(fields, call, training, wrapped_in):
    class Mode(tnn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.training

    model = TorchModule(Mode().train(wrapped_in), **fields)
    expected = wrapped_in if training is None else training
    assert float(model.apply({}, jnp.zeros(()), **call)) == expected


@pytest.mark.parametrize(
    ("fields", "training"), [({}, True), ({"train": False}, False), ({"deterministic": True}, False)]
)
def test_to_torch_module_follows_the_fields(fields, training):
    assert torchleaf.to_torch_module(TorchModule(tnn.Dropout(0.5), **fields), {}).training is training


@pytest.mark.parametrize(
    ("fields", "call", "error", "message"),
    [
        ({"train": True}, {"train": True}, ValueError, "constructor and at call time"),
        ({}, {"train": True, "deterministic": True}, ValueError, "contradict"),
        ({"deterministic": True}, {"train": True}, ValueError, "contradict"),
    ],
)
def test_modes_that_contradict(fields, call, error, message):
    with pytest.raises(error, match=message):
        TorchModule(tnn.Identity(), **fields).apply({}, jnp.ones(3), **call)


@pytest.mark.usefixtures("no_type_checks")
def test_a_traced_mode_is_refused():
    model = TorchModule(tnn.Identity())
    with pytest.raises(TypeError, match=r"`train` is traced.*TorchModule\(module, train=\.\.\.\)"):
        jax.jit(lambda x, train: model.apply({}, x, train=train))(jnp.ones(3), True)


def test_a_forward_with_an_argument_named_train():
    class Own(tnn.Module):
        def forward(self, x: torch.Tensor, train: bool = False) -> torch.Tensor:
            return x + 10 * train + self.training

    model, x = TorchModule(Own().eval()), jnp.zeros(())
    assert float(model.apply({}, x, train=True)) == 10
    assert float(model.apply({}, x, train=True, deterministic=False)) == 11
    assert float(TorchModule(Own().eval(), train=True).apply({}, x)) == 1


def test_submodules_in_another_mode_stay_so():
    module = tnn.Sequential(tnn.Linear(3, 3), tnn.Dropout(0.5).eval())
    model, x = TorchModule(module), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    assert_trees_close(model.apply(variables, x), model.apply(variables, x, train=False), rtol=0, atol=0)


# --- methods -----------------------------------------------------------------------------------


class _Codec(tnn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = tnn.Linear(3, 2), tnn.Linear(2, 3)

    def encode(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.encoder(x)) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encode(x))


@pytest.mark.usefixtures("no_type_checks")
def test_options_are_checked():
    with pytest.raises(ValueError, match="vmap_method must be one of"):
        TorchModule(tnn.Linear(3, 4), vmap_method="batch")


@eager_and_jit
def test_methods_by_name(jit, rng):
    module, x = _Codec(), _normal(rng, 3)
    model = TorchModule(module)
    variables = model.init(KEY, x)
    expected = from_torch(module.encode(torchleaf.to_torch(x), scale=2.0))
    for call in (
        lambda v: model.apply(v, x, scale=2.0, method="encode"),
        lambda v: model.apply(v, x, scale=2.0, method=model.encode),
        lambda v: model.apply(v, "encode", x, scale=2.0, method="call"),
        lambda v: model.bind(v).encode(x, scale=2.0),
        lambda v: model.bind(v).call("encode", x, scale=2.0),
    ):
        assert_trees_close(jit(call)(variables), expected)
    grads = jit(jax.grad(lambda v: model.apply(v, x, method="encode").sum()))(variables)["params"]
    assert jnp.any(grads["encoder"]["weight"])
    assert not jnp.any(grads["decoder"]["weight"])


def test_init_by_another_method_gives_all_variables(rng):
    x = _normal(rng, 3)
    model = TorchModule(_Codec())
    assert_trees_close(model.init(KEY, x, method="encode"), model.init(KEY, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["decode", "encoder", "state_dict", "training", "eval", "_private"])
def test_methods_that_torch_has_not_or_that_are_of_every_module(name):
    model = TorchModule(_Codec())
    with pytest.raises(AttributeError, match=name):
        getattr(model, name)


# --- weights in torch's terms, and on disk ------------------------------------------------------


def _moved(variables):
    """Other values in every leaf, integers too."""
    return jax.tree.map(lambda w: w + 1 if w.dtype != bool else w, variables)


@pytest.mark.parametrize("make", [_mixed, lambda: TiedAutoencoder(5, 3), lambda: Channels(3)])
def test_state_dict_round_trip(make):
    module = make()
    model = TorchModule(module)
    x = jnp.arange(3) if isinstance(module, TiedAutoencoder) else jnp.ones((5, 3))
    variables = model.init(KEY, x)
    state = torchleaf.state_dict(model, variables)
    _assert_same_tensors(state, module.state_dict())
    other = make()
    loaded = torchleaf.load_state_dict(model, other.state_dict(), variables)
    _assert_same_tensors(torchleaf.state_dict(model, loaded), other.state_dict())
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert_trees_close(variables, model.init(KEY, x), rtol=0, atol=0)
    plain = torchleaf.to_torch_module(model, _moved(variables))
    _assert_same_tensors(plain.state_dict(), torchleaf.state_dict(model, _moved(variables)))
    assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == [
        (n, p.requires_grad) for n, p in module.named_parameters()
    ]


def test_state_dict_is_zero_copy():
    module = _mixed()
    model = TorchModule(module)
    for name, tensor in torchleaf.state_dict(model, model.init(KEY, jnp.ones((5, 3)))).items():
        if tensor.dtype != torch.int64:
            assert tensor.data_ptr() == module.state_dict()[name].data_ptr(), name


def test_bound_modules_bring_their_variables(rng):
    module, x = _mixed().eval(), _normal(rng, 5, 3)

    class Model(nn.Module):
        def setup(self):
            self.encoder, self.head = TorchModule(module), nn.Dense(3)

        def __call__(self, x):
            return self.head(self.encoder(x))

    variables = _moved(Model().init(KEY, x))
    encoder = Model().bind(variables).encoder
    inner = {col: tree["encoder"] for col, tree in variables.items()}
    _assert_same_tensors(torchleaf.state_dict(encoder), torchleaf.state_dict(TorchModule(module), inner))
    loaded = torchleaf.load_state_dict(encoder, module.state_dict())
    assert_trees_close(loaded["params"], TorchModule(module).init(KEY, x)["params"], rtol=0, atol=0)
    plain = torchleaf.to_torch_module(encoder)
    assert_trees_close(from_torch(plain(torchleaf.to_torch(x))), encoder(x))


def test_load_state_dict_gives_the_kind_of_dict_it_got():
    module = _mixed()
    model = TorchModule(module)
    variables = freeze(model.init(KEY, jnp.ones((5, 3))))
    assert isinstance(torchleaf.load_state_dict(model, module.state_dict(), variables), FrozenDict)


def test_weights_without_variables_are_refused():
    model = TorchModule(_mixed())
    variables = model.init(KEY, jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=r"state_dict\(model, variables\).*model\.bind"):
        torchleaf.state_dict(model)
    with pytest.raises(KeyError, match=r"no frozen/0/weight; they have the collections \['params'\]"):
        torchleaf.state_dict(model, {"params": variables["params"]})


def test_safetensors_both_ways(tmp_path):
    module, file = _mixed(), tmp_path / "weights.safetensors"
    model = TorchModule(module)
    variables = _moved(model.init(KEY, jnp.ones((5, 3))))
    safetensors.torch.save_file(torchleaf.state_dict(model, variables), file)
    plain = _mixed()
    plain.load_state_dict(safetensors.torch.load_file(file))
    _assert_same_tensors(plain.state_dict(), torchleaf.state_dict(model, variables))
    again = torchleaf.load_state_dict(model, safetensors.torch.load_file(file), model.init(KEY, jnp.ones((5, 3))))
    assert_trees_close(again, variables, rtol=0, atol=0)
    arrays = {name: leaf for col in variables.values() for name, leaf in flatten_dict(col, sep=".").items()}
    safetensors.flax.save_file(arrays, file)
    assert_trees_close(safetensors.flax.load_file(file), arrays, rtol=0, atol=0)
    loaded = safetensors.torch.load_file(file)
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in plain.state_dict().items())


def test_msgpack_and_orbax(tmp_path):
    model = TorchModule(_mixed())
    template = model.init(KEY, jnp.ones((5, 3)))
    variables = _moved(template)
    restored = serialization.from_bytes(template, serialization.to_bytes(variables))
    assert_trees_close(jax.tree.map(jnp.asarray, restored), variables, rtol=0, atol=0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", template)
    assert_trees_close(restored, variables, rtol=0, atol=0)
    x = jnp.ones((5, 3))
    assert_trees_close(model.apply(restored, x, train=False), model.apply(variables, x, train=False), rtol=0, atol=0)


def test_masks_by_path_choose_what_weight_decay_touches():
    model = TorchModule(_mixed())
    params = model.init(KEY, jnp.ones((5, 3)))["params"]
    mask = path_aware_map(lambda path, _: path[-1] == "weight" and path[0] != "1", params)
    optimizer = optax.add_decayed_weights(0.1, mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert jax.tree.map(lambda u: bool(jnp.any(u)), updates) == mask
    assert flatten_dict(mask, sep=".")["3.weight"]


# --- channels last -----------------------------------------------------------------------------


def test_conv_of_flax_computes_the_same(rng):
    x = _normal(rng, 2, 8, 9, 3)
    model, conv = TorchModule(tnn.Conv2d(3, 4, 3, padding=1), channels_last=True), nn.Conv(4, (3, 3))
    variables = model.init(KEY, x)
    theirs = {"kernel": variables["params"]["weight"].transpose(2, 3, 1, 0), "bias": variables["params"]["bias"]}
    expected = conv.apply({"params": theirs}, x)
    assert expected.shape == (2, 8, 9, 4)
    assert_trees_close(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def _cnn() -> tnn.Module:
    return tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.BatchNorm2d(8), tnn.ReLU(), tnn.MaxPool2d(2), tnn.Conv2d(8, 4, 3))


@eager_and_jit
def test_a_batch_norm_network_trains_channels_last_as_in_torch(jit):
    module = _cnn()
    model = TorchModule(copy.deepcopy(module), channels_last=True, copy_weights=True)
    variables = model.init(KEY, jnp.zeros((2, 12, 12, 3)))

    def loss(params, rest, x):
        y, updates = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        return jnp.mean(y**2), (y, updates)

    step = jit(jax.value_and_grad(loss, has_aux=True))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12)
        (_, (y, rest)), grads = step(params, rest, from_torch(x.movedim(1, -1)))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        expected = module(x)
        optimizer.zero_grad()
        expected.square().mean().backward()
        optimizer.step()
        assert_trees_close(y, from_torch(expected.movedim(1, -1)), rtol=1e-4, atol=1e-4)
    trained = _by_torch_name({"params": params, **rest})
    assert_trees_close(trained, from_torch(_tensors(module)), rtol=1e-4, atol=1e-4)


def test_torch_sees_views_in_its_layout():
    seen = []

    class Look(tnn.Module):
        def forward(self, image: torch.Tensor, mask: torch.Tensor, row: torch.Tensor, ids: torch.Tensor):
            contiguous = image.is_contiguous(memory_format=torch.channels_last)
            pointer = None if isinstance(image, FakeTensor) else image.data_ptr()
            seen.append((contiguous, image.shape, pointer, mask.shape, row.shape, ids.shape))
            return image, ids

    model = TorchModule(Look(), channels_last=True)
    image, mask = jnp.zeros((2, 5, 6, 3)), jnp.ones((5, 6, 3), bool)
    y, ids = jax.jit(lambda *args: model.apply({}, *args))(image, mask, jnp.ones((2, 7)), jnp.ones((2, 3, 4), int))
    assert (y.shape, ids.shape) == ((2, 5, 6, 3), (2, 3, 4))
    contiguous, shape, pointer, *others = seen[-1]
    assert contiguous
    assert shape == (2, 3, 5, 6)
    assert pointer == image.unsafe_buffer_pointer()
    assert others == [(5, 6, 3), (2, 7), (2, 3, 4)]


def test_channels_last_under_vmap(rng):
    module, x = _cnn().eval(), _normal(rng, 3, 4, 12, 12, 3)
    model = TorchModule(module, channels_last=True)
    variables = model.init(KEY, x[0])
    outputs = jax.vmap(lambda x: model.apply(variables, x))(x)
    assert_trees_close(outputs, jnp.stack([model.apply(variables, row) for row in x]), rtol=1e-4, atol=1e-5)
