"""What a call accepts and does, in every framework: methods, dtypes, options, gradients of what is not trained."""

import copy

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import ParameterContainers
from frameworks import eager_and_jit, every_framework
from torch import nn

pytestmark = [every_framework, pytest.mark.both_engines]


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


# --- methods -------------------------------------------------------------------------------------


class _Codec(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def encode(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.encoder(x)) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encode(x))


@eager_and_jit
def test_other_methods_than_forward(framework, jit, x):
    module = _Codec()
    model = framework(module)
    expected = module.encode(torchleaf.to_torch(x), scale=2.0)

    def loss(model, x):
        code = model(x, method="encode", scale=2.0)
        return code.sum(), code

    grads = model.maybe_jit(lambda m, x: m.gradients(loss, x), jit=jit)(x)
    assert_trees_close(grads.aux, from_torch(expected))
    expected.sum().backward()
    assert_trees_close(grads.weights.params["encoder.weight"], from_torch(module.encoder.weight.grad))
    assert not jnp.any(grads.weights.params["decoder.weight"])
    again = model.maybe_jit(lambda m, x: m(x, method="forward"), jit=jit)(x)
    assert_trees_close(again, model.maybe_jit(lambda m, x: m(x), jit=jit)(x), rtol=0, atol=0)


def test_methods_batch(framework, x):
    module = _Codec()
    codes = framework(module).vmap(lambda m, x: m(x, method="encode"))(x)
    assert_trees_close(codes, from_torch(module.encode(torchleaf.to_torch(x))))


def test_containers_with_several_outputs_are_rebuilt(framework, x):
    assert set(framework(ParameterContainers(3))(x)) == {"y", "shifted"}


# --- what is not trained -------------------------------------------------------------------------


def _half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    module[0].requires_grad_(False)
    return module


@eager_and_jit
def test_no_gradient_flows_to_frozen_parameters_and_buffers(framework, jit, x):
    def loss(model, x):
        return (model(x) ** 2).sum(), None

    grads = framework(_half_frozen()).maybe_jit(lambda m, x: m.gradients(loss, x), jit=jit)(x).weights
    assert set(grads.frozen) == {"0.weight", "0.bias"}
    assert set(grads.buffers) == {"1.running_mean", "1.running_var"}
    assert not any(jnp.any(g) for g in jax.tree.leaves((grads.frozen, grads.buffers)))
    assert all(jnp.any(g) for g in grads.params.values())


@pytest.mark.parametrize("kind", ["frozen", "buffers"])
def test_no_tangent_comes_from_them(framework, kind, x):
    model = framework(_half_frozen())
    constants = {n: leaf for n, leaf in getattr(model.weights, kind).items() if leaf.dtype == jnp.float32}
    _, tangent = jax.jvp(lambda leaves: model.replaced(leaves)(x), (constants,), (constants,))
    assert constants
    assert not jnp.any(tangent)


def test_a_forward_that_writes_into_a_parameter_leaves_the_leaf_alone(framework):
    """Embedding with `max_norm` scales its rows in place; the call sees that, JAX's immutable memory does not."""
    module = nn.Embedding(5, 3, max_norm=0.5)
    ids, before = torch.tensor([0, 3]), module.weight.detach().clone()
    model = framework(module, copy=True)
    outputs = [model(from_torch(ids)) for _ in range(2)]
    assert_trees_close(model.weights.params["weight"], from_torch(before), rtol=0, atol=0)
    assert_trees_close(outputs, [from_torch(module(ids))] * 2)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cast_leaves_compute_in_their_dtype(framework, dtype, x):
    module = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 2))
    model, x = framework(module), x.astype(dtype)
    model = model.replaced({name: leaf.astype(dtype) for name, leaf in model.weights.all.items()})
    cast = copy.deepcopy(module).to(torchleaf.to_torch(x).dtype)

    def loss(model):
        y = model(x)
        return y.sum().astype(jnp.float32), y

    grads = model.gradients(loss)
    assert grads.aux.dtype == dtype
    assert_trees_close(grads.aux, torchleaf.to_jax(cast(torchleaf.to_torch(x))), rtol=1e-3, atol=1e-3)
    assert {g.dtype for g in grads.weights.params.values()} == {jnp.dtype(dtype)}


def test_int64_buffers_arrive_as_int64_in_torch(framework):
    seen = []

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([2, 0], dtype=torch.int64))
            self.register_buffer("small", torch.tensor([2, 0], dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.index.dtype, self.small.dtype))
            return x[self.index] + self.small

    model = framework(Table())
    buffers = model.weights.buffers
    assert (buffers["index"].dtype, buffers["small"].dtype) == (jnp.int32, jnp.int32)
    assert_trees_close(model(jnp.arange(3.0)), jnp.array([4.0, 0.0]))
    assert set(seen) == {(torch.int64, torch.int32)}


# --- options -------------------------------------------------------------------------------------


@pytest.mark.torch_engine
def test_forward_mode_option_reaches_the_call(framework):
    model, x = framework(nn.Linear(3, 4), forward_mode=False), jnp.ones(3)
    assert jax.grad(lambda x: model(x).sum())(x).shape == (3,)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(model, (x,), (x,))


@pytest.mark.torch_engine
def test_vmap_method_option_reaches_the_call(framework, rng):
    class Sequence(nn.GRU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    gru = Sequence(3, 4, batch_first=True)
    xs = jnp.asarray(rng.normal(size=(6, 5, 3)), jnp.float32)
    expected = from_torch(gru(torchleaf.to_torch(xs)))
    for method in ("batched", "loop"):
        assert_trees_close(framework(gru, vmap_method=method).vmap(lambda m, x: m(x))(xs), expected)
    with pytest.raises(torchleaf.TorchCallError, match=r"vmap of Sequence: .* Use vmap_method='auto' or 'loop'"):
        framework(gru, vmap_method="vmap").vmap(lambda m, x: m(x))(xs)


@pytest.mark.torch_engine
def test_out_shape_option_serves_a_forward_that_reads_values(framework, x):
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return super().forward(x)

    module, x = Checked(3, 4), x[0]
    model = framework(module, out_shape=jax.ShapeDtypeStruct((4,), jnp.float32))

    def loss(model, x):
        y = model(x)
        return y.sum(), y

    grads = model.jit(lambda m, x: m.gradients(loss, x))(x)
    call = model.jit(lambda m, x: m(x))
    assert_trees_close([grads.aux, call(x)], [from_torch(module(torchleaf.to_torch(x)))] * 2)
    assert_trees_close(grads.weights.params["weight"], jnp.broadcast_to(x, (4, 3)))
    with pytest.raises(Exception, match="Checked raised ValueError: x is not finite"):
        jax.block_until_ready(call(x * jnp.nan))
