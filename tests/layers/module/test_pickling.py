"""All four kinds of object go through pickle, cloudpickle, `copy` and Equinox's files, before and after calls."""

import copy
import io
import pickle

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from custom_layers import TiedAutoencoder
from flax import nnx
from frameworks import every_framework
from fresh_process import run_python
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)


def square(x):
    return x**2


@torchleaf.torch_function
def decorated(x):
    return torch.sin(x)


def _mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.LSTM(4, 2)).eval()


MODULES = {
    "linear": lambda: nn.Linear(3, 2),
    "mlp": lambda: _mlp()[:3],
    "transformer": lambda: nn.TransformerEncoderLayer(3, 1, 8, 0.0).eval(),
    "spectral": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)).eval(),
    "frozen": lambda: nn.Linear(3, 2).requires_grad_(False),
}
ways = pytest.mark.parametrize(
    "way",
    [
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: cloudpickle.loads(cloudpickle.dumps(x)),
        copy.deepcopy,
        copy.copy,
    ],
    ids=["pickle", "cloudpickle", "deepcopy", "copy"],
)


def _wrapped(framework, module):
    """The model, how to call it, and what to pickle."""
    if framework.name == "linen":
        model = torchleaf.linen.TorchModule(module)
        variables = model.init(jax.random.key(0), from_torch(X))
        return model, lambda m: m.apply(variables, from_torch(X))
    if framework.name == "nnx":
        return torchleaf.nnx.TorchModule(module), lambda m: m(from_torch(X))
    return torchleaf.TorchModule(module), lambda m: m(from_torch(X))


@ways
@every_framework
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_models(framework, make, way):
    """Before a call, after one, after a compiled one, and after gradients; the copy computes the same."""
    module = make()
    model, call = _wrapped(framework, module)
    before = way(model)
    expected = call(model)
    assert_trees_close(call(before), expected)
    jitted = nnx.jit(call) if framework.name == "nnx" else eqx.filter_jit(call)
    jitted(model)
    jax.block_until_ready(jax.grad(lambda x: jnp.sum(jnp.asarray(call(model)) * x))(1.0))
    after = way(model)
    assert_trees_close(call(after), expected)
    assert_trees_close(jitted(after), expected)


@ways
@every_framework
def test_what_a_copy_is(framework, way):
    """It is of the same structure as its model; ties, state dict and the way back to torch are the model's."""
    if framework.name == "linen":
        return
    module = TiedAutoencoder(5, 3)
    model = (torchleaf.nnx.TorchModule if framework.name == "nnx" else torchleaf.TorchModule)(module)
    ids = jnp.array([1, 2])
    expected = model(ids)
    twin = way(model)
    assert_trees_close(twin(ids), expected)
    structures = [nnx.split(m)[0] if framework.name == "nnx" else jax.tree.structure(m) for m in (model, twin)]
    assert structures[0] == structures[1]
    assert torchleaf.state_dict(twin).keys() == module.state_dict().keys()
    back = torchleaf.to_torch_module(twin)
    assert back.embed.weight is back.project.weight


@ways
@pytest.mark.parametrize(
    "make", [lambda: torchleaf.torch_function(square), lambda: decorated], ids=["plain", "decorated"]
)
def test_functions(make, way):
    function, x = make(), jnp.arange(3.0)
    expected = function(x)
    jax.jit(jax.grad(lambda x: function(x).sum()))(x)
    twin = way(function)
    assert_trees_close(twin(x), expected)
    assert_trees_close(jax.vmap(twin)(x), expected)


def test_by_value():
    """cloudpickle takes closures along; pickle says what it always says of them."""
    function = torchleaf.torch_function(lambda x: x + 1)
    function(jnp.ones(3))
    assert_trees_close(cloudpickle.loads(cloudpickle.dumps(function))(jnp.ones(3)), 2 * jnp.ones(3))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(function)


def test_a_state_and_its_model():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
    _, state = model(from_torch(X), state)
    again, again_state = pickle.loads(pickle.dumps((model, state)))
    given = jax.tree.map(lambda x: x, state)
    assert_trees_close(again(from_torch(X), again_state)[0], model(from_torch(X), given)[0])


def test_serialised_leaves():
    model, like = (torchleaf.TorchModule(_mlp()[:2]) for _ in range(2))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), model)


@pytest.mark.long
def test_in_another_process(tmp_path):
    """Nothing of this process is in the file: no handle, no cache, no address."""
    model = torchleaf.TorchModule(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
    expected = jax.jit(lambda x: model(x))(from_torch(X))
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, expected)))
    shown = run_python(
        f"""
        import pickle, jax, jax.numpy as jnp, torchleaf
        model, expected = pickle.loads(open({str(path)!r}, "rb").read())
        x = jnp.linspace(-1.5, 2, 6).reshape(2, 3)
        assert jnp.allclose(model(x), expected, atol=1e-6)
        assert jnp.allclose(jax.jit(lambda x: model(x))(x), expected, atol=1e-6)
        print(jax.grad(lambda x: model(x).sum())(x).shape)
        """
    )
    assert "(2, 3)" in shown
