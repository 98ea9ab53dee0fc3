"""Modules of every dtype: what torch gives forward and backward, in dtypes that stay what they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import Channels
from module_reference import eager_and_filter_jit, torch_gradients_of, weighted_sum
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)


class ConvNet(nn.Module):
    """Reads images as they are stored, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.conv.weight.dtype
        return self.head(self.norm(self.conv(images.to(dtype) / 255)).relu().mean((-2, -1)))


class Masked(nn.Module):
    """Attention over tokens, some of them padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y, _ = self.attention(x, x, x, key_padding_mask=mask)
        return self.norm(x + y).masked_fill(mask[..., None], 0)


class MixedPrecision(nn.Module):
    """A normalisation in float32 within layers of lower precision, as large models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def bfloat16(self) -> "MixedPrecision":
        super().bfloat16()
        self.norm.float()
        return self

    def half(self) -> "MixedPrecision":
        super().half()
        self.norm.float()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x).to(self.norm.weight.dtype)).to(self.second.weight.dtype))


class Autocast(nn.Module):
    """Chooses its precision itself."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.body = dtype, nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", self.dtype):
            y = self.body(x)
        return y, y.float().logsumexp(-1)


def images():
    return (torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8),)


def tokens():
    return torch.randint(11, (2, 4)), torch.arange(4).expand(2, 4) >= torch.tensor([[3], [4]])


MODULES = {
    "uint8 images": (lambda: ConvNet().eval(), images),
    "tokens and masks": (Masked, tokens),
    "mixed precision": (MixedPrecision, lambda: (torch.randn(5, 3),)),
    "recurrent": (lambda: nn.GRU(3, 4), lambda: (torch.randn(6, 2, 3),)),
    "embedding bag": (lambda: nn.EmbeddingBag(10, 4, mode="mean"), lambda: (torch.randint(10, (2, 5)),)),
}
PRECISIONS = {
    "float32": (nn.Module.float, torch.float32, 1e-5),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, 2e-2),
    "float16": (lambda m: m.half(), torch.float16, 2e-3),
}


def to(dtype, tensors):
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)


def check(module, args, jit, tolerance):
    """Output and gradients with the values and the dtypes of torch; the gradients have those of the leaves."""
    model = torchleaf.TorchModule(module)

    def run(inputs):
        output = inputs[0](*inputs[1])
        return weighted_sum(output), output

    grads, output = jit(eqx.filter_grad(run, has_aux=True))((model, from_torch(args)))
    expected = from_torch(module(*args)), *torch_gradients_of(module, module, args, {})
    assert_trees_close((output, grads[0].params, jax.tree.leaves(grads[1])), expected, rtol=tolerance, atol=tolerance)
    assert {name: g.dtype for name, g in grads[0].params.items()} == {n: p.dtype for n, p in model.params.items()}


@eager_and_filter_jit
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODULES)
def test_module(name, precision, jit):
    (make, draw), (cast, dtype, tolerance) = MODULES[name], PRECISIONS[precision]
    check(cast(make()), to(dtype, draw()), jit, tolerance)


@pytest.mark.long
@eager_and_filter_jit
@pytest.mark.parametrize("name", MODULES)
def test_module_in_float64(name, jit, x64):
    make, draw = MODULES[name]
    check(make().double(), to(torch.float64, draw()), jit, 1e-12)


@eager_and_filter_jit
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_the_forward(dtype, jit):
    """Weights and their gradients stay in float32."""
    check(Autocast(dtype), (torch.randn(5, 3),), jit, 1e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_keeps_the_precision(precision):
    """Steps of SGD as torch makes them, in the module's own precision."""
    cast, dtype, tolerance = PRECISIONS[precision]
    module, x = cast(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), torch.randn(6, 3).to(dtype)
    model, optimizer = torchleaf.TorchModule(module, copy=True), optax.sgd(2**-4)

    @eqx.filter_jit
    def step(model, opt_state, x):
        grads = eqx.filter_grad(lambda m: jnp.square(m(x)).mean())(model)
        updates, opt_state = optimizer.update(grads.params, opt_state, model.params)
        return eqx.tree_at(lambda m: m.params, model, optax.apply_updates(model.params, updates)), opt_state

    opt_state, torch_optimizer = optimizer.init(model.params), torch.optim.SGD(module.parameters(), 2**-4)
    for _ in range(4):
        model, opt_state = step(model, opt_state, from_torch(x))
        torch_optimizer.zero_grad()
        module(x).square().mean().backward()
        torch_optimizer.step()
    expected = {name: from_torch(p) for name, p in module.named_parameters()}
    assert_trees_close(model.params, expected, rtol=tolerance, atol=tolerance)
    assert {p.dtype for p in torchleaf.to_torch_module(model).parameters()} == {dtype}


# --- integers ----------------------------------------------------------------------------------


def test_labels_and_indices_of_any_integer_type():
    """What JAX has by default, int32, stands for torch's int64; other types are given as they are."""
    module = nn.Embedding(10, 4)
    model = torchleaf.TorchModule(module)
    for ids in (jnp.array([1, 9]), np.array([1, 9], np.int64)):
        assert_trees_close(model(ids), from_torch(module(torch.tensor([1, 9]))))
    with pytest.raises((torchleaf.TorchCallError, jax.errors.JaxRuntimeError), match="RuntimeError: "):
        jax.block_until_ready(model(jnp.array([1, 9], jnp.int8)))  # as torch itself refuses it


def test_integer_buffers_come_back_as_torch_had_them():
    module = Channels(4)
    model = torchleaf.TorchModule(module)
    assert (model.buffers["order"].dtype, model.buffers["keep"].dtype) == (jnp.int32, jnp.bool_)
    state = torchleaf.state_dict(model)
    assert (state["order"].dtype, state["keep"].dtype) == (torch.int64, torch.bool)
    again = torchleaf.load_state_dict(model, state)
    assert_trees_close(again.buffers, model.buffers, rtol=0, atol=0)
    back = torchleaf.to_torch_module(model)
    assert (back.order.dtype, back.keep.dtype) == (torch.int64, torch.bool)
    x = torch.randn(3, 4)
    assert_trees_close(from_torch(back(x)), model(from_torch(x)))


@pytest.mark.parametrize("x64", [False, True])
def test_counters_count_in_int64(x64):
    """num_batches_tracked goes through JAX's default integer and back."""
    with jax.enable_x64(x64):
        module = nn.BatchNorm1d(3)
        model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
        for _ in range(3):
            _, state = model(jnp.ones((4, 3), jnp.float32), state=state)
        tracked = torchleaf.state_dict(model, state)["num_batches_tracked"]
        assert (tracked.dtype, tracked.item()) == (torch.int64, 3)
        assert int(module.num_batches_tracked) == 0


def test_buffers_too_large_for_int32():
    module = nn.Linear(2, 2)
    module.register_buffer("large", torch.tensor([2**40]))
    with pytest.raises(OverflowError, match=r"Linear.large .*does not fit int32.*jax_enable_x64"):
        torchleaf.TorchModule(module)
    with jax.enable_x64(True):
        assert torchleaf.TorchModule(module).buffers["large"].item() == 2**40
