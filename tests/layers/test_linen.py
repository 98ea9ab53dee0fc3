"""The Linen `TorchModule`: its variables, calls and methods."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from custom_layers import Channels, TiedAutoencoder
from flax import errors
from flax.core import freeze
from layer_catalogue import SPECS
from linen_models import by_torch_name, mixed, normal, tensors
from module_reference import snapshot, torch_gradients_of, weighted_sum
from torch import nn as tnn

pytestmark = pytest.mark.both_engines

TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


# --- variables -----------------------------------------------------------------------------------


def test_variables_nest_by_torch_names_in_collections():
    variables = TorchModule(mixed()).init(KEY, jnp.ones((5, 3)))
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
        assert_trees_close(by_torch_name(variables), from_torch(tensors(module)), rtol=0, atol=0)
        assert snapshot(module) == before
        if spec.random == "never":
            assert_trees_close(output, from_torch(module(*args, **kwargs)), spec.tolerance, spec.tolerance)


@pytest.mark.parametrize(
    "module",
    [mixed(), tnn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), Channels(3)],
    ids=["mixed", "channels_last", "buffers"],
)
def test_variables_share_memory_with_torch_unless_copied(module):
    x = jnp.ones((5, 3, 5, 5)) if isinstance(module, tnn.Conv2d) else jnp.ones((5, 3))
    views = by_torch_name(TorchModule(module).init(KEY, x))
    copies = by_torch_name(TorchModule(module, copy_weights=True).init(KEY, x))
    for name, tensor in tensors(module).items():
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
    module, x = mixed(), jnp.ones((5, 3))
    model = TorchModule(module)
    if how == "eval_shape":
        shapes = jax.eval_shape(model.init, KEY, x)
        assert_trees_close(jax.tree.map(jnp.zeros_like, shapes), jax.tree.map(jnp.zeros_like, model.init(KEY, x)))
        return
    init = model.lazy_init if how == "lazy_init" else how(model.init)
    given = jax.ShapeDtypeStruct(x.shape, x.dtype) if how == "lazy_init" else x
    assert_trees_close(by_torch_name(init(KEY, given)), from_torch(tensors(module)), rtol=0, atol=0)


def test_init_does_not_update_statistics():
    module = mixed()
    variables = TorchModule(module).init(KEY, 5 * jnp.ones((5, 3)))
    assert_trees_close(variables["batch_stats"]["1"], from_torch(dict(module[1].named_buffers())), rtol=0, atol=0)


def test_tied_weights_are_one_variable():
    module = TiedAutoencoder(5, 3)
    model, ids = TorchModule(module), torch.arange(5)
    variables = model.init(KEY, from_torch(ids))
    assert jax.tree.map(jnp.shape, variables["params"]) == {"embed": {"weight": (5, 3)}, "project": {"bias": (5,)}}
    grads = jax.grad(lambda v: weighted_sum(model.apply(v, from_torch(ids))))(variables)
    expected, _ = torch_gradients_of(module, module, (ids,), {})
    assert_trees_close(by_torch_name(grads), expected)


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
    module, x = _Clashing(), normal(rng, 5, 3)

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
    model, x = TorchModule(mixed().eval()), jnp.ones((5, 3))
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


def test_lazy_modules_are_refused():
    with pytest.raises(TypeError, match="uninitialised"):
        TorchModule(tnn.LazyLinear(3))


# --- calls ---------------------------------------------------------------------------------------


@eager_and_jit
def test_values_and_gradients(jit, rng):
    module = mixed().eval()
    model, x = TorchModule(module), torch.randn(5, 3)
    variables = model.init(KEY, from_torch(x))
    assert_trees_close(jit(model.apply)(variables, from_torch(x)), from_torch(module(x)))
    grads, grad_x = jit(jax.grad(lambda v, x: weighted_sum(model.apply(v, x)), argnums=(0, 1), allow_int=True))(
        variables, from_torch(x)
    )
    expected, (expected_x,) = torch_gradients_of(module, module, (x,), {})
    assert_trees_close((by_torch_name({"params": grads["params"]}), grad_x), (expected, expected_x))
    constants = {**by_torch_name({"f": grads["frozen"]}), **by_torch_name({"b": grads["batch_stats"]})}
    assert not any(jnp.any(g) for g in constants.values() if g.dtype != jax.dtypes.float0)


def test_dense_of_flax_computes_the_same(rng):
    module, x = tnn.Linear(3, 4), normal(rng, 5, 3)
    model, dense = TorchModule(module), nn.Dense(4)
    variables = model.init(KEY, x)
    theirs = {"params": {"kernel": variables["params"]["weight"].T, "bias": variables["params"]["bias"]}}
    assert_trees_close(model.apply(variables, x), dense.apply(theirs, x))
    ours = jax.grad(lambda v: weighted_sum(model.apply(v, x)))(variables)["params"]
    grads = jax.grad(lambda v: weighted_sum(dense.apply(v, x)))(theirs)["params"]
    assert_trees_close(ours, {"weight": grads["kernel"].T, "bias": grads["bias"]})


def test_batch_norm_of_flax_computes_the_same(rng):
    x = 3 * normal(rng, 50, 4) + 1
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
    model, x = TorchModule(mixed()), jnp.ones((5, 3))
    variables = model.init(KEY, x)
    y, updates = model.apply(freeze(variables), x, mutable=["batch_stats"], rngs={"dropout": KEY})
    expected = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": KEY})
    assert_trees_close((y, updates), expected, rtol=0, atol=0)


@pytest.mark.torch_engine
def test_options_reach_the_call(rng):
    x = normal(rng, 3)
    reverse = TorchModule(tnn.Linear(3, 4), forward_mode=False)
    variables = reverse.init(KEY, x)
    assert jax.grad(lambda x: reverse.apply(variables, x).sum())(x).shape == (3,)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: reverse.apply(variables, x), (x,), (x,))
    changed = TorchModule(tnn.Linear(3, 4)).copy(forward_mode=False)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: changed.apply(variables, x), (x,), (x,))


@pytest.mark.torch_engine
def test_out_shape_option_serves_a_forward_that_reads_values(rng):
    class Checked(tnn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return {"y": super().forward(x)}

    module, x = Checked(3, 4), normal(rng, 3)
    model = TorchModule(module, out_shape={"y": jax.ShapeDtypeStruct((4,), jnp.float32)})
    variables = model.init(KEY, x)
    assert hash(model) == hash(model.copy())
    assert_trees_close(jax.jit(model.apply)(variables, x), from_torch(module(torchleaf.to_torch(x))))


# --- methods -------------------------------------------------------------------------------------


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
    module, x = _Codec(), normal(rng, 3)
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
    x = normal(rng, 3)
    model = TorchModule(_Codec())
    assert_trees_close(model.init(KEY, x, method="encode"), model.init(KEY, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["decode", "encoder", "state_dict", "training", "eval", "_private"])
def test_methods_that_torch_has_not_or_that_are_of_every_module(name):
    model = TorchModule(_Codec())
    with pytest.raises(AttributeError, match=name):
        getattr(model, name)
