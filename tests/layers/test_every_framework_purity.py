"""Modules whose forward is no pure function: in every framework the error names what changes and the remedy."""

import jax.numpy as jnp
import pytest
import torch
import torchleaf
from custom_layers import Counting
from frameworks import EquinoxModel, LinenModel, eager_and_jit, every_framework
from torch import nn
from torchleaf import StateError, TorchCallError

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.ones((2, 3))


def _call(model, *, jit):
    return model.maybe_jit(lambda m, x: m(x), jit=jit)(X)


class _Stateful(nn.Module):
    """Has every kind of attribute that a forward can change."""

    def __init__(self):
        super().__init__()
        self.linear, self.child = nn.Linear(3, 3), nn.Identity()
        self.register_buffer("total", torch.zeros(3))
        self.hidden, self.child.calls = torch.zeros(3), 0
        self.history: list[object] = []
        self.stats = {"calls": 0}


class _BufferInPlace(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum(0)
        return x + self.total


class _BufferReassigned(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + x.sum(0)
        return x + self.total


class _CounterOfChild(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.calls += 1
        return x * self.child.calls


class _PlainTensorReassigned(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = torch.tanh(x.sum(0) + self.hidden)
        return x + self.hidden


class _PlainTensorInPlace(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden += 1
        return x + self.hidden


class _ListOfTensors(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(self.linear(x))
        return x


class _ListOfNumbers(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(1)
        return x * len(self.history)


class _Dict(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stats["calls"] += 1
        return x * self.stats["calls"]


@pytest.mark.parametrize("framework", [EquinoxModel, LinenModel], ids=lambda f: f.name)
@eager_and_jit
@pytest.mark.parametrize(
    ("module", "what"),
    [
        (lambda: nn.BatchNorm1d(3), "BatchNorm1d changes buffer `num_batches_tracked`, `running_mean`, `running_var`"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
            r"ParametrizedLinear changes buffer `parametrizations\.weight\.0\._u`",
        ),
        (_BufferInPlace, "_BufferInPlace changes buffer `total`"),
        (_BufferReassigned, "_BufferReassigned changes buffer `total`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_of_buffers_without_a_place_for_them_are_refused(framework, jit, module, what):
    model = framework(module(), with_state=False)
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(StateError, match=rf"{what}.*{framework.state_remedy}"):
            _call(model, jit=jit)


@every_framework
@eager_and_jit
@pytest.mark.parametrize(
    ("module", "what"),
    [
        (lambda: Counting(3), "Counting changes attribute `calls`"),
        (_CounterOfChild, r"_CounterOfChild changes attribute `child\.calls`"),
        (_PlainTensorReassigned, "_PlainTensorReassigned changes attribute `hidden`"),
        (_PlainTensorInPlace, "_PlainTensorInPlace changes attribute `hidden`"),
        (_ListOfTensors, "_ListOfTensors changes attribute `history`"),
        (_ListOfNumbers, "_ListOfNumbers changes attribute `history`"),
        (_Dict, "_Dict changes attribute `stats`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_of_attributes_are_refused(framework, jit, module, what):
    model = framework(module(), with_state=True)
    for _ in range(2):
        with pytest.raises(StateError, match=rf"{what}.*Make it a buffer"):
            _call(model, jit=jit)


class _StashesInput(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = x[0]
        return self.linear(x)


class _LeaksInput(_Stateful):
    kept: list[torch.Tensor] = []  # noqa: RUF012 (the point of it)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return self.linear(x)


@pytest.mark.long
@every_framework
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_StashesInput, r"_StashesInput keeps an argument.*`child\.last`.*tensor\.clone\(\)"),
        (_LeaksInput, r"_LeaksInput keeps argument x .*tensor\.clone\(\)"),
    ],
)
def test_an_argument_that_stays_behind_is_refused(framework, module, message):
    with pytest.raises(TorchCallError, match=message):
        framework(module())(X)
    _LeaksInput.kept.clear()


class _StashesResult(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = torch.tanh(self.linear(x))
        return self.child.last * 2


@every_framework
def test_a_result_kept_for_inspection_does_not_stay(framework):
    """Many models keep attention maps so; the skeleton must not hold on to memory of one call."""
    module = _StashesResult()
    model = framework(module)
    for x in (X, 2 * X):
        assert jnp.allclose(model(x), module(torchleaf.to_torch(x)).detach().numpy(), rtol=1e-5)
    assert not hasattr(model.skeleton.child, "last")


@every_framework
def test_write_into_a_tensor_of_no_module(framework):
    total = torch.zeros(3)

    class Accumulating(torch.nn.Module):
        def forward(self, x):
            total.add_(1)
            return x + total

    model = framework(Accumulating())
    with pytest.raises(StateError, match=r"Accumulating writes into a tensor of shape .*captured"):
        model(jnp.ones(3))
    assert torch.equal(total, torch.zeros(3))
