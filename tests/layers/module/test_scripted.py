"""Parts of TorchScript, generated code and sparse attributes: torch's values and derivatives at every run."""

import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import every_framework
from module_reference import torch_gradients_of, weighted_sum
from scripted_layers import SCRIPTED, Generated, Scale, SparseAttribute, scripted
from torch import nn
from torchleaf import StateError, TorchModule
from untouched import unchanged

X = torch.linspace(-1.5, 2, 12).reshape(4, 3)
RUNS = 5
"""TorchScript's executor specialises its code in the first two runs, and again where gradients are required."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning"),
]
every_module = pytest.mark.parametrize("make", SCRIPTED.values(), ids=SCRIPTED)


def _scaled(model, factor):
    return model.replaced({name: factor * leaf for name, leaf in model.weights.all.items()})


def _put(module, model):
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.copy_(torchleaf.to_torch(model.weights.all[name]))


@every_module
@every_framework
def test_values_and_gradients_at_each_run(framework, make):
    """Each run with other weights; forward and gradient in turns."""
    module, x = make(), from_torch(X)
    model = framework(module, copy=True)
    call = model.jit(lambda m, x: m(x))
    for run in range(RUNS):
        given = _scaled(model, 1 + 0.25 * run)
        eager, (gradients, compiled) = (
            given(x),
            (
                given.gradients(lambda m, x: (weighted_sum(m(x)), None), x),
                given.jit(lambda m, x: m(x))(x),
            ),
        )
        _put(module, given)
        expected = from_torch(module(X))
        assert_trees_close(eager, expected)
        assert_trees_close(compiled, expected)
        weights, (inputs,) = torch_gradients_of(module, module, (X,), {})
        assert_trees_close(gradients.weights.params, weights)
        assert_trees_close(gradients.inputs[0], inputs)
    _put(module, model)
    assert_trees_close(call(x), from_torch(module(X)))


@every_module
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_compiled_gradients_at_each_run(make, residuals):
    module = make()
    model, x = TorchModule(module, residuals=residuals, copy=True), from_torch(X)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = jax.jit(jax.value_and_grad(lambda p, x: weighted_sum(eqx.combine(p, static)(x))))
    for run in range(RUNS):
        given = jax.tree.map(lambda leaf, run=run: (1 + 0.25 * run) * leaf, params)
        value, grads = step(given, x)
        twin = torchleaf.to_torch_module(eqx.combine(given, static))
        assert_trees_close(value, weighted_sum(from_torch(twin(X))), rtol=1e-4)
        assert_trees_close(grads.params, torch_gradients_of(twin, twin, (X,), {})[0])


@pytest.mark.long
@every_module
def test_second_derivatives_and_batches(make):
    module = make()
    model, x = TorchModule(module), X[:2]

    def torch_loss(x):
        return (module(x) ** 2).sum()

    def loss(x):
        return (model(x) ** 2).sum()

    expected = torch.autograd.functional.hessian(torch_loss, x)
    for transform in (jax.hessian, lambda f: jax.jacrev(jax.grad(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        assert_trees_close(jax.jit(transform(loss))(from_torch(x)), from_torch(expected), rtol=1e-4, atol=1e-5)
    assert_trees_close(jax.vmap(model)(from_torch(x[:, None])), jnp.stack([model(row[None]) for row in from_torch(x)]))
    per_example = jax.vmap(jax.grad(loss))(from_torch(x[:, None]))
    assert_trees_close(per_example, jnp.stack([jax.grad(loss)(row[None]) for row in from_torch(x)]))


@every_module
def test_the_original_stays_as_it_is(make):
    module, x = make(), from_torch(X)
    model = TorchModule(module, copy=True)
    with unchanged(model, torch_module=module):
        eqx.filter_jit(lambda m, x: m(x))(jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, model), x)
    assert torchleaf.state_dict(model).keys() == module.state_dict().keys()
    back = torchleaf.to_torch_module(model)
    assert torch.equal(back(X), module(X))


@every_framework
def test_state_of_a_scripted_part(framework):
    module, x = nn.Sequential(nn.Linear(3, 3), scripted(nn.BatchNorm1d(3))), from_torch(X)
    model = framework(module, with_state=True, copy=True)
    for _ in range(3):
        y = model(x)
        assert_trees_close(y, from_torch(module(X)))
    statistics = {name: leaf for name, leaf in model.weights.buffers.items() if "running" in name}
    assert_trees_close(statistics, {name: from_torch(module.get_buffer(name)) for name in statistics})


def test_randomness_of_a_scripted_part():
    model, x = TorchModule(scripted(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))), from_torch(X)
    key = jax.random.key(0)
    once, again = model(x, key=key), jax.jit(lambda x, key: model(x, key=key))(x, key)
    assert_trees_close(once, again)
    assert not jnp.array_equal(once, model(x, key=jax.random.key(1)))


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


@every_framework
def test_an_attribute_that_scripted_code_changes_is_refused(framework):
    model = framework(nn.Sequential(scripted(_Counting())))
    with pytest.raises(StateError, match=r"changes attribute `0\.calls`"):
        model(from_torch(X))


class _Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.ws = [self.w, torch.zeros(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.ws[0]


def test_a_weight_in_a_scripted_list_is_refused():
    with pytest.raises(TypeError, match="the TorchScript attribute `ws` holds weights in a list"):
        TorchModule(nn.Sequential(scripted(_Lists())))


def test_sparse_rows():
    module = SparseAttribute("csr")
    assert_trees_close(TorchModule(module)(from_torch(X)), from_torch(module(X)))


def test_generated_code_is_not_compiled_again(monkeypatch):
    module = Generated()
    monkeypatch.setattr(torch.jit, "save", None)
    monkeypatch.setattr(torch.jit, "load", None)
    assert_trees_close(TorchModule(module)(from_torch(X)), from_torch(module(X)))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # torch's own
def test_quantised_parts():
    """Their weights are no parameters, and no gradient flows through them: torch would take it for zero."""
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, dtype=torch.qint8)
    x = from_torch(X)
    for module in (nn.Sequential(nn.Linear(3, 3), quantised), nn.Sequential(quantised, nn.Linear(3, 3))):
        call = eqx.filter_jit(TorchModule(module, replay=False))
        for _ in range(RUNS):
            assert_trees_close(call(x), from_torch(module(X)))
    gradient = eqx.filter_grad(lambda m: weighted_sum(m(x)))
    grads = gradient(TorchModule(nn.Sequential(quantised, module[1])))
    assert_trees_close(grads.params, torch_gradients_of(module, module, (X,), {})[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="goes through quantized::linear_dynamic"):
        gradient(TorchModule(nn.Sequential(module[1], quantised)))


def test_frozen_code():
    """`torch.jit.freeze` has made constants of the weights, as torch has it."""
    module = nn.Sequential(nn.Linear(3, 3), torch.jit.freeze(scripted(Scale().eval())))
    model, x = TorchModule(module), from_torch(X)
    for _ in range(RUNS):
        assert_trees_close(model(x), from_torch(module(X)))
    grads = eqx.filter_grad(lambda m: weighted_sum(m(x)))(model)
    assert_trees_close(grads.params, torch_gradients_of(module, module, (X,), {})[0])


def test_traces_leave_nothing_in_compiled_code():
    """TorchScript's optimiser makes constants of tensors, those of a mode too; it rests there, in no other thread."""
    seen = []

    def function(x):
        here = torch._C._get_graph_executor_optimize()
        thread = threading.Thread(target=lambda: seen.append((here, torch._C._get_graph_executor_optimize())))
        thread.start()
        thread.join()
        return x * 2

    torchleaf.torch_function(function)(from_torch(X))
    assert set(seen) == {(False, True), (True, True)}
    assert torch._C._get_graph_executor_optimize()
