"""`get_extra_state` and `set_extra_state`: state dicts go both ways as torch's do."""

import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import EquinoxModel, LinenModel, NNXModel, every_framework
from torch import nn

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)


class Versioned(nn.Linear):
    """Its extra state is what it multiplies with."""

    def __init__(self):
        super().__init__(3, 3)
        self.factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor

    def get_extra_state(self):
        return {"factor": self.factor}

    def set_extra_state(self, state):
        self.factor = state["factor"]


class Summed(nn.Linear):
    """Its extra state is a tensor that is computed from a weight."""

    def __init__(self):
        super().__init__(3, 3)
        self.loaded = 0.0

    def get_extra_state(self):
        return self.weight.detach().sum()

    def set_extra_state(self, state):
        self.loaded = float(state)


def _nested():
    return nn.Sequential(Versioned(), nn.ModuleDict({"a": Versioned(), "b": nn.Linear(3, 2)})["a"])


@every_framework
@pytest.mark.parametrize("make", [Versioned, Summed, _nested])
def test_out_of_a_model(framework, make):
    module = make()
    found, expected = framework(module).state_dict(), module.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
    other = make()
    other.load_state_dict(found)
    assert_trees_close(from_torch(other(X)), from_torch(module(X)))


@every_framework
@pytest.mark.parametrize("make", [Versioned, _nested])
def test_into_a_model(framework, make):
    """Weights, and the same extra state."""
    model, other = framework(make()), make()
    loaded = model.load_state_dict(other.state_dict())
    assert_trees_close(loaded(from_torch(X)), from_torch(other(X)))


@pytest.mark.parametrize("framework", [EquinoxModel, NNXModel], ids=lambda f: f.name)
@pytest.mark.parametrize("make", [Versioned, _nested])
def test_another_extra_state(framework, make):
    """It changes what the module computes, so the model gets another static part."""
    model, other = framework(make()), make()
    next(m for m in other.modules() if isinstance(m, Versioned)).factor = 3.0
    before = model(from_torch(X))
    loaded = model.load_state_dict(other.state_dict())
    assert_trees_close(loaded(from_torch(X)), from_torch(other(X)))
    assert_trees_close(model(from_torch(X)), before)
    assert_trees_close(from_torch(loaded.to_torch()(X)), from_torch(other(X)))


def test_linen_has_no_place_for_another_extra_state():
    model, other = LinenModel(Versioned()), Versioned()
    other.factor = 3.0
    with pytest.raises(ValueError, match=r"another extra state.*module\.load_state_dict\(state_dict\)"):
        model.load_state_dict(other.state_dict())
    module = Versioned()
    module.load_state_dict(other.state_dict())  # the remedy
    assert_trees_close(LinenModel(module)(from_torch(X)), from_torch(other(X)))


@every_framework
def test_what_is_missing_is_named(framework):
    model, module = framework(Versioned()), Versioned()
    given = {name: value for name, value in module.state_dict().items() if name != "_extra_state"}
    with pytest.raises(KeyError, match=r"missing \['_extra_state'\]"):
        model.load_state_dict(given)
    with pytest.raises(KeyError, match=r"unexpected \['_extra_state'\]"):
        framework(nn.Linear(3, 3)).load_state_dict(module.state_dict())


def test_a_round_trip_through_a_file(tmp_path):
    module = _nested()
    torch.save(torchleaf.state_dict(torchleaf.TorchModule(module)), tmp_path / "state.pt")
    other = _nested()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert jnp.array_equal(torchleaf.TorchModule(other)(from_torch(X)), torchleaf.TorchModule(module)(from_torch(X)))
