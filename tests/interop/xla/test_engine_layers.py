"""Every layer of the catalogue, computed by XLA with `strict=True`: values, gradients and batches as in torch."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import FRAMEWORKS, EquinoxModel
from layer_catalogue import SPECS, looped
from module_reference import snapshot, torch_gradients_of, weighted_sum

# torch says so once per process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
XLA = {"engine": "xla", "strict": True}


def _made(spec, framework=EquinoxModel):
    module = spec.make()
    return module, framework(module, **spec.options, **XLA)


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    with jax.enable_x64(request.param.x64):
        yield replace(request.param, tolerance=max(request.param.tolerance, 2e-5))


def _loss(model, args, kwargs):
    outputs = model(*args, **kwargs)
    return weighted_sum(outputs), outputs


def _assert_gradients(spec, grads, function, module, args, kwargs):
    close = {"rtol": spec.tolerance, "atol": spec.tolerance}
    assert_trees_close(grads.aux, from_torch(function(*args, **kwargs)), **close)
    expected = torch_gradients_of(function, module, args, kwargs)
    assert_trees_close((grads.weights.params, grads.inputs), expected, **close)
    assert not any(jnp.any(g) for g in jax.tree.leaves((grads.weights.frozen, grads.weights.buffers)))


@pytest.mark.long
@pytest.mark.all_cases
def test_outputs_and_gradients(spec):
    module, model = _made(spec)
    before = snapshot(module)
    args, kwargs = spec.draw()
    grads = model.jit(lambda m, *inputs: m.gradients(_loss, *inputs))(*from_torch((args, kwargs)))
    assert snapshot(module) == before
    _assert_gradients(spec, grads, module, module, args, kwargs)


def test_eager_outputs(spec):
    module, model = _made(spec)
    args, kwargs = spec.draw()
    expected = from_torch(module(*args, **kwargs))
    assert_trees_close(
        model(*from_torch(args), **from_torch(kwargs)), expected, rtol=spec.tolerance, atol=spec.tolerance
    )


def test_vmap_and_its_gradients(spec):
    """Without a loop, and without torch's batching rules."""
    module, model = _made(spec)
    args, kwargs = spec.draw_batch(3)

    def loss(model, args, kwargs):
        outputs = model.vmap(lambda m, a, k: m(*a, **k))(args, kwargs)
        return weighted_sum(outputs), outputs

    grads = model.jit(lambda m, *inputs: m.gradients(loss, *inputs))(*from_torch((args, kwargs)))
    _assert_gradients(spec, grads, looped(module, 3), module, args, kwargs)


@pytest.mark.all_cases
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.name)
def test_every_framework_has_the_engine(framework):
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    model, x = framework(module, **XLA), torch.randn(4, 2, 6)
    assert_trees_close(model(from_torch(x)), from_torch(module(x)), rtol=1e-5, atol=1e-5)
    jaxpr = str(jax.make_jaxpr(model)(from_torch(x)))
    assert "conv_general_dilated" in jaxpr
    assert "torch_call" not in jaxpr


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.all_cases
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5)], ids=str)
def test_running_statistics_are_torchs(framework, shape):
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
    module = torch.nn.Sequential(kind(3), torch.nn.Tanh()).train()
    model = framework(module, with_state=True, **XLA)
    for x in torch.randn(3, *shape):
        assert_trees_close(model(from_torch(x)), from_torch(module(x)), rtol=1e-5, atol=1e-5)
    assert_trees_close(dict(model.weights.buffers), from_torch(dict(module.named_buffers())), rtol=1e-5, atol=1e-6)


def test_state_changes_inside_a_compiled_program():
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            self.count[1:] += x.sum()
            self.last = x[:2] * 2
            return x + self.count.sum()

    module = Counter()
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module, **XLA)
    x = torch.arange(3.0)

    @eqx.filter_jit
    def step(model, state, x):
        return model(x, state=state)

    for _ in range(3):
        y, state = step(model, state, from_torch(x))
        assert_trees_close(y, from_torch(module(x)))
    assert_trees_close(state.get(model.buffer_index), from_torch(dict(module.named_buffers())))


def test_lost_state_is_an_error_as_in_the_other_engine():
    model = torchleaf.TorchModule(torch.nn.BatchNorm1d(3), engine="xla")
    with pytest.raises(torchleaf.StateError, match=r"changes buffer.*make_with_state"):
        model(jnp.ones((4, 3)))
