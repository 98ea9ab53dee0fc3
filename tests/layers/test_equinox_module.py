"""`TorchModule` itself: which leaf is where, whose memory it is, what the static part holds, what a call accepts."""

import copy
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels, ParameterContainers, TiedAutoencoder
from layer_catalogue import SPECS
from module_reference import eager_and_filter_jit, snapshot
from torch import nn


def _mixed() -> nn.Module:
    """Trainable and frozen parameters, buffers, evaluation mode."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module(torch.randn(8, 3))
    module[0].requires_grad_(False)
    return module.eval()


def _leaves(model: torchleaf.TorchModule) -> dict[str, jax.Array]:
    return {**model.params, **model.frozen, **model.buffers}


def test_leaves_stand_under_torch_names_by_kind():
    model = torchleaf.TorchModule(_mixed())
    assert list(model.params) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(model.frozen) == ["0.weight", "0.bias"]
    assert list(model.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert model.inference is True
    assert torchleaf.TorchModule(nn.Linear(3, 4)).inference is False


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_leaves_are_the_tensors_of_torch(spec):
    with jax.enable_x64(spec.x64):
        module = spec.make()
        leaves = _leaves(torchleaf.TorchModule(module))
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        assert leaves.keys() == tensors.keys()
        assert_trees_close(leaves, from_torch({n: tensors[n] for n in leaves}), rtol=0, atol=0)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 4), _mixed(), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.LSTM(3, 4), Channels(4)],
    ids=["Linear", "mixed", "channels_last", "LSTM", "buffers"],
)
def test_leaves_share_memory_with_torch_unless_copied(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    views = _leaves(torchleaf.TorchModule(module))
    copies = _leaves(torchleaf.TorchModule(module, copy=True))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:  # int32 in JAX without x64
            assert views[name].unsafe_buffer_pointer() == tensor.data_ptr(), name
        assert copies[name].unsafe_buffer_pointer() != tensor.data_ptr(), name
    assert_trees_close(copies, views, rtol=0, atol=0)


def test_shared_memory_shows_torch_updates_and_copies_do_not():
    linear = nn.Linear(3, 4)
    view, copied = torchleaf.TorchModule(linear), torchleaf.TorchModule(linear, copy=True)
    x = jnp.ones(3)
    before = copied(x)
    with torch.no_grad():
        linear.weight.add_(1)
    assert_trees_close(view(x), from_torch(linear(torch.ones(3))))
    assert_trees_close(copied(x), before, rtol=0, atol=0)


def test_leaves_outlive_the_torch_module():
    linear = nn.Linear(300, 400)
    expected = linear.weight.detach().clone().numpy()
    model, gone = torchleaf.TorchModule(linear), weakref.ref(linear)
    del linear
    gc.collect()
    torch.randn(400, 300)  # would reuse freed memory
    assert gone() is None
    np.testing.assert_array_equal(model.params["weight"], expected)


def test_tied_weights_are_one_leaf_with_the_sum_of_gradients():
    module = TiedAutoencoder(5, 3)
    model = torchleaf.TorchModule(module)
    assert list(model.params) == ["embed.weight", "project.bias"]
    moved = eqx.tree_at(lambda m: m.params["embed.weight"], model, replace_fn=lambda w: w + 1)
    with torch.no_grad():
        changed = copy.deepcopy(module)
        changed.embed.weight += 1
    ids = torch.arange(5)
    assert_trees_close(moved(from_torch(ids)), from_torch(changed(ids)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_static_part_holds_no_weights(spec):
    with jax.enable_x64(spec.x64):
        skeleton = torchleaf.TorchModule(spec.make()).module.skeleton
        tensors = [*skeleton.parameters(), *skeleton.buffers()]
        assert {t.device.type for t in tensors} <= {"meta"}


def test_plain_tensor_attributes_stay_in_the_static_part():
    module = nn.Linear(2, 2)
    module.table = torch.arange(3.0)
    skeleton = torchleaf.TorchModule(module).module.skeleton
    assert torch.equal(skeleton.table, module.table)


def test_static_part_compares_by_identity():
    module = nn.Linear(3, 4)
    one, other = torchleaf.TorchModule(module), torchleaf.TorchModule(module)
    assert one.module != other.module
    assert hash(one.module) != hash(other.module)
    assert jax.tree.structure(one) == jax.tree.structure(eqx.tree_at(lambda m: m.params["bias"], one, jnp.zeros(4)))
    assert jax.tree.structure(one) != jax.tree.structure(other)


def test_equal_structure_means_one_compilation():
    model, traces = torchleaf.TorchModule(nn.Linear(3, 4)), []

    @eqx.filter_jit
    def call(model, x):
        traces.append(1)
        return model(x)

    call(model, jnp.ones(3))
    call(eqx.tree_at(lambda m: m.params["bias"], model, jnp.ones(4)), jnp.ones(3))
    assert len(traces) == 1


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_leaves_the_module_as_it_was(training):
    module = _mixed().train(training)
    before = snapshot(module)
    assert torchleaf.TorchModule(module).inference is not training
    assert snapshot(module) == before


class _Codec(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def encode(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.encoder(x)) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encode(x))


@eager_and_filter_jit
def test_other_methods_than_forward(jit, rng):
    module = _Codec()
    model = torchleaf.TorchModule(module)
    x = jnp.asarray(rng.normal(size=3), jnp.float32)
    code = jit(lambda m, x: m.call("encode", x, scale=2.0))(model, x)
    expected = module.encode(torchleaf.to_torch(x), scale=2.0)
    assert_trees_close(code, from_torch(expected))
    grads = jit(eqx.filter_grad(lambda m: m.call("encode", x, scale=2.0).sum()))(model)
    expected.sum().backward()
    assert_trees_close(grads.params["encoder.weight"], from_torch(module.encoder.weight.grad))
    assert not jnp.any(grads.params["decoder.weight"])
    assert_trees_close(jit(lambda m, x: m.call("forward", x))(model, x), model(x), rtol=0, atol=0)


def test_methods_batch(rng):
    module = _Codec()
    xs = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    codes = jax.vmap(lambda x: torchleaf.TorchModule(module).call("encode", x))(xs)
    assert_trees_close(codes, from_torch(module.encode(torchleaf.to_torch(xs))))


@eager_and_filter_jit
def test_no_gradient_flows_to_frozen_parameters_and_buffers(jit, rng):
    model = torchleaf.TorchModule(_mixed())
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    grads = jit(eqx.filter_grad(lambda m: (m(x) ** 2).sum()))(model)
    assert not any(jnp.any(g) for g in jax.tree.leaves((grads.frozen, grads.buffers)))
    assert all(jnp.any(g) for g in grads.params.values())


def test_no_tangent_comes_from_frozen_parameters(rng):
    model = torchleaf.TorchModule(_mixed())
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    _, tangent = jax.jvp(lambda f: eqx.tree_at(lambda m: m.frozen, model, f)(x), (model.frozen,), (model.frozen,))
    assert not jnp.any(tangent)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cast_leaves_compute_in_their_dtype(dtype, rng):
    module = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 2))
    model = jax.tree.map(lambda w: w.astype(dtype) if eqx.is_inexact_array(w) else w, torchleaf.TorchModule(module))
    x = jnp.asarray(rng.normal(size=(5, 3)), dtype)
    cast = copy.deepcopy(module).to(torchleaf.to_torch(x).dtype)
    y = model(x)
    assert y.dtype == dtype
    assert_trees_close(y, torchleaf.to_jax(cast(torchleaf.to_torch(x))), rtol=1e-3, atol=1e-3)
    grads = eqx.filter_grad(lambda m: m(x).sum().astype(jnp.float32))(model)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


def test_int64_buffers_arrive_as_int64_in_torch():
    seen = []

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([2, 0], dtype=torch.int64))
            self.register_buffer("small", torch.tensor([2, 0], dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.index.dtype, self.small.dtype))
            return x[self.index] + self.small

    model = torchleaf.TorchModule(Table())
    assert (model.buffers["index"].dtype, model.buffers["small"].dtype) == (jnp.int32, jnp.int32)
    assert_trees_close(model(jnp.arange(3.0)), jnp.array([4.0, 0.0]))
    assert set(seen) == {(torch.int64, torch.int32)}


def test_forward_mode_option_reaches_the_call():
    model = torchleaf.TorchModule(nn.Linear(3, 4), forward_mode=False)
    x = jnp.ones(3)
    assert jax.grad(lambda x: model(x).sum())(x).shape == (3,)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(model, (x,), (x,))


def test_vmap_method_option_reaches_the_call(rng):
    class Sequence(nn.GRU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[0]

    gru = Sequence(3, 4, batch_first=True)
    xs = jnp.asarray(rng.normal(size=(6, 5, 3)), jnp.float32)
    expected = from_torch(gru(torchleaf.to_torch(xs)))
    for method in ("batched", "loop"):
        assert_trees_close(jax.vmap(torchleaf.TorchModule(gru, vmap_method=method))(xs), expected)
    with pytest.raises(torchleaf.TorchCallError, match=r"vmap of Sequence: .* Use vmap_method='auto' or 'loop'"):
        jax.vmap(torchleaf.TorchModule(gru, vmap_method="vmap"))(xs)


def test_out_shape_option_serves_a_forward_that_reads_values(rng):
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return super().forward(x)

    module = Checked(3, 4)
    model = torchleaf.TorchModule(module, out_shape=jax.ShapeDtypeStruct((4,), jnp.float32))
    x = jnp.asarray(rng.normal(size=3), jnp.float32)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, x: m(x).sum()))(model, x)
    assert_trees_close(eqx.filter_jit(model)(x), from_torch(module(torchleaf.to_torch(x))))
    assert_trees_close(grads.params["weight"], jnp.broadcast_to(x, (4, 3)))
    with pytest.raises(Exception, match="Checked raised ValueError: x is not finite"):
        jax.block_until_ready(eqx.filter_jit(model)(x * jnp.nan))


def test_a_forward_that_writes_into_a_parameter_leaves_the_leaf_alone():
    """Embedding with `max_norm` scales its rows in place; the call sees that, JAX's immutable memory does not."""
    module = nn.Embedding(5, 3, max_norm=0.5)
    ids, before = torch.tensor([0, 3]), module.weight.detach().clone()
    model = torchleaf.TorchModule(module, copy=True)
    outputs = [model(from_torch(ids)) for _ in range(2)]
    assert_trees_close(model.params["weight"], from_torch(before), rtol=0, atol=0)
    assert_trees_close(outputs, [from_torch(module(ids))] * 2)


def test_containers_with_several_outputs_are_rebuilt(rng):
    module = ParameterContainers(3)
    y = torchleaf.TorchModule(module)(jnp.asarray(rng.normal(size=(5, 3)), jnp.float32))
    assert set(y) == {"y", "shifted"}
