"""What is made once for a torch module in Linen, and what `init` puts in the place of its weights."""

import copy
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch
from linen_models import by_torch_name, mixed, normal, tensors
from module_reference import snapshot
from torch import nn as tnn

pytestmark = pytest.mark.both_engines(every=4)
TorchModule = torchleaf.linen.TorchModule
KEY = jax.random.key(0)


# --- one skeleton per torch module ---------------------------------------------------------------


def test_clones_share_the_skeleton():
    model = TorchModule(tnn.Linear(3, 4))
    assert model.clone().made is model.made
    assert model.copy(name="encoder").made is model.made
    assert model == model.clone()
    assert hash(model) == hash(model.clone())


def test_a_torch_module_wrapped_again_is_known_again():
    module = mixed()
    first = TorchModule(module).made.module
    with torch.no_grad():
        module(torch.randn(8, 3))  # other statistics
        module[3].weight.mul_(2)
    assert TorchModule(module).made.module is first
    assert TorchModule(module, residuals="recompute").made.module is not first
    assert TorchModule(copy.deepcopy(module)).made.module is not first


def test_a_torch_module_that_was_wrapped_can_die():
    module = mixed()
    TorchModule(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


class _Configured(tnn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.activation = tnn.Linear(3, 3), torch.tanh
        self.scale, self.table, self.settings = 2.0, torch.ones(3), {"shift": [1.0]}
        self.offsets, self.config = np.zeros(3, np.float32), type("Config", (), {})()
        self.config.power = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.linear(x)) * self.scale * self.table + self.settings["shift"][0]
        return y**self.config.power + float(self.offsets[0])


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
        lambda module: module.offsets.__setitem__(0, 5.0),
        lambda module: module.eval(),
        lambda module: module.linear.requires_grad_(False),
    ],
    ids=["number", "function", "submodule", "object", "container", "tensor", "NumPy", "mode", "frozen"],
)
def test_a_torch_module_that_has_changed_is_taken_apart_anew(change, rng):
    module, x = _Configured(), normal(rng, 5, 3)
    first = TorchModule(module)
    change(module)
    again = TorchModule(module)
    assert again.made.module is not first.made.module
    output, variables = again.init_with_output(KEY, x)
    assert_trees_close(output, from_torch(module(torchleaf.to_torch(x))))
    assert ("frozen" in variables) is (not module.linear.weight.requires_grad)


# --- initialisers --------------------------------------------------------------------------------


@pytest.mark.long
def test_jax_initializer_makes_every_trainable_parameter():
    module, x = mixed(), jnp.ones((5, 3))
    variables = TorchModule(module, initializer=nn.initializers.normal(10.0)).init(KEY, x)
    torch_variables = TorchModule(module).init(KEY, x)
    assert_trees_close(
        {**variables, "params": None}, {**torch_variables, "params": None}, rtol=0, atol=0
    )  # frozen parameters and statistics are torch's
    leaves = jax.tree.leaves(variables["params"])
    assert all(jnp.std(leaf) > 3 for leaf in leaves)
    assert len({float(leaf.ravel()[0]) for leaf in leaves}) == len(leaves)


def test_initializers_by_name():
    module = mixed()
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
        TorchModule(mixed(), initializer=initializer).init(KEY, jnp.ones((5, 3)))


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
        for tensor in tensors(module).values():
            tensor.add_(100 if tensor.is_floating_point() else 7)
    model = TorchModule(module, initializer="reset_parameters")
    state, torch_generator = snapshot(module), torch.get_rng_state()
    init = jit(lambda key: model.init(key, *args))
    one, again, other = init(KEY), init(KEY), init(jax.random.key(1))
    assert torch.equal(torch.get_rng_state(), torch_generator)
    assert snapshot(module) == state
    assert_trees_close(one, again, rtol=0, atol=0)
    for name, tensor in tensors(make()).items():
        ours, theirs = np.asarray(by_torch_name(one)[name]), tensor.detach().numpy()
        constant = np.ptp(theirs) == 0
        if constant:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            assert not np.array_equal(ours, by_torch_name(other)[name]), name
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
    variables = by_torch_name(TorchModule(module, initializer="reset_parameters").init(KEY, jnp.ones((5, 3))))
    for name, tensor in tensors(module).items():
        assert jnp.array_equal(variables[name], from_torch(tensor)) == (name != "2.weight"), name


@pytest.mark.long
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
