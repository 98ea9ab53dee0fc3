"""The copy that runs is whole: whatever leads to the module leads to the copy, and weights are wherever they were."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import RUNS, assert_trees_close, from_torch
from frameworks import EquinoxModel, every_framework
from module_reference import torch_gradients_of, weighted_sum
from untouched import unchanged
from whole_copies import closures, places

X = torch.linspace(-1.5, 2, 6).reshape(2, 3)
CASES = {**closures(), **places()}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def _other_weights(model):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for name, leaf in sorted(model.weights.all.items())
    }


def _put(module, leaves):
    getattr(getattr(module, "f", None), "forget", lambda: None)()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.copy_(torch.from_numpy(np.array(leaves[name])))


@every_case
@every_framework
def test_it_computes_with_the_weights_that_it_is_given(framework, make):
    """Other values than the module was wrapped with; afterwards torch gets the same, into the module itself."""
    module, x = make(), from_torch(X)
    model = framework(module, copy=True)
    with unchanged(model.weights, torch_module=module):
        other = model.replaced(_other_weights(model))
        outputs = [other(x), *(other.jit(lambda m, x: m(x))(x) for _ in range(2))]
        gradients = other.gradients(lambda m, x: (weighted_sum(m(x)), None), x)
    _put(module, _other_weights(model))
    for output in outputs:
        assert_trees_close(output, from_torch(module(X)))
    weights, (inputs,) = torch_gradients_of(module, module, (X,), {})
    assert_trees_close(gradients.weights.params, weights)
    assert_trees_close(gradients.inputs[0], inputs)


@every_case
def test_compiled_runs(make):
    """The first two runs record, later ones replay; each with other weights."""
    module, x = make(), from_torch(X)
    model = EquinoxModel(module, copy=True)
    step = jax.jit(lambda leaves, x: jax.value_and_grad(lambda p, x: weighted_sum(model.replaced(p)(x)))(leaves, x))
    for run in range(RUNS):
        leaves = {name: (1 + run) * leaf for name, leaf in _other_weights(model).items()}
        value, grads = step(leaves, x)
        _put(module, leaves)
        assert_trees_close(value, weighted_sum(from_torch(module(X))), rtol=1e-4)
        weights, _ = torch_gradients_of(module, module, (X,), {})
        assert_trees_close({name: grads[name] for name in weights}, weights, rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop:UserWarning")
def test_vmap_over_members(make):
    module, x = make(), from_torch(X)
    models = [EquinoxModel(module, copy=True)]
    models += [models[0].replaced({n: 2 * leaf for n, leaf in models[0].weights.all.items()})]
    ensemble = EquinoxModel.stack(models)
    outputs = ensemble.vmap_members(lambda m, x: m(x))(x)
    for output, model in zip(outputs, models, strict=True):
        assert_trees_close(output, model(x))


@pytest.mark.all_cases
@every_case
def test_back_to_torch(make):
    """The torch module that comes back is whole as well: its functions use its own weights."""
    module = make()
    model = EquinoxModel(module, copy=True)
    other = model.replaced(_other_weights(model))
    back = other.to_torch()
    assert_trees_close(other(from_torch(X)), from_torch(back(X)))
    expected = copy.deepcopy(module.state_dict())
    _put(module, _other_weights(model))
    assert_trees_close(from_torch(back(X)), from_torch(module(X)))
    grads, _ = torch_gradients_of(back, back, (X,), {})
    assert_trees_close(grads, torch_gradients_of(module, module, (X,), {})[0])
    assert expected.keys() == back.state_dict().keys()
