"""`torchleaf.check` finds faults: the user's, and torchleaf's, wherever they are made."""

import itertools
import sys

import numpy as np
import pytest
import torch
import torchleaf
import torchleaf.linen
import torchleaf.nnx
from checking import X, outcome
from torch import nn
from torchleaf.layers.check.numbers import WrongError, compare


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * gradient


def test_a_backward_that_is_not_the_derivative():
    report = torchleaf.check(lambda x: WrongBackward.apply(x), X)
    assert not report.ok
    found = report["finite differences"]
    assert found.status == "wrong"
    assert "torch's own gradient is not the derivative" in found.text
    assert report["gradients"].status == "ok"  # they are torch's


def test_a_function_that_treats_a_batch_as_a_whole():
    centre = torchleaf.torch_function(lambda x: x - x.mean(), vmap_method="batched")
    assert outcome("forward", centre, X).status == "ok"
    found = outcome("vmap", centre, X)
    assert found.status == "wrong"
    assert "run 1: array 0 is off by" in found.text


def test_a_function_that_is_not_pure():
    numbers = itertools.count(1)
    found = outcome("forward", lambda x: x * next(numbers), X)
    assert found.status == "wrong"
    assert "run 1: output 0 is off by" in found.text


def perturb(monkeypatch, owner, name, change):
    before = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(before(*args, **kwargs)))


def off(outs):
    """The first output is off by a thousandth."""
    return (outs[0] * 1.001, *outs[1:])


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        ("base.Base", "compute", "forward"),
        ("graph.Graph", "pullback", "gradients"),
        ("derivative", "forward_mode", "forward mode"),
        ("batching.Vmap", "compute", "vmap"),
    ],
)
def test_faults_of_torchleaf(monkeypatch, where, name, wrong):
    """Wrong numbers at each place of the machinery, in every call so that no comparison of its own would show them."""
    module, _, cls = where.partition(".")
    owner = sys.modules[f"torchleaf.interop.calls.{module}"]
    perturb(monkeypatch, getattr(owner, cls) if cls else owner, name, off)
    monkeypatch.setattr("torchleaf.interop.calls.choice.disagreement", lambda call, plan, tensors: None)
    found = outcome(wrong, nn.Linear(3, 2), X)
    assert found.status == "wrong", found
    assert "off by 1.0e-03" in found.text


def test_a_fault_of_replays_alone(monkeypatch):
    """The first two runs are right."""
    replay = torchleaf.interop.calls.execution.Planned.replay

    def faulty(self, operands, results):
        done = replay(self, operands, results)
        if done:
            results[0].mul_(1.001)
        return done

    monkeypatch.setattr(torchleaf.interop.calls.execution.Planned, "replay", faulty)
    found = outcome("forward", nn.Linear(3, 2), X)
    assert found.status == "wrong"
    assert "compiled, run 3" in found.text


def test_a_fault_of_state(monkeypatch):
    with_buffers = torchleaf.TorchModule.with_buffers

    def faulty(self, state, changed):
        return with_buffers(self, state, {n: x * 1.01 if x.ndim else x for n, x in changed.items()})

    monkeypatch.setattr(torchleaf.TorchModule, "with_buffers", faulty)
    found = outcome("state", nn.BatchNorm1d(3), X)
    assert found.status == "wrong"
    assert "buffer `running_mean`" in found.text


def test_a_fault_of_keys(monkeypatch):
    """Numbers that do not depend on the key."""
    monkeypatch.setattr("torchleaf.interop.modes.random._seed", lambda words: 7)
    found = outcome("keys", nn.Dropout(), X)
    assert found.status == "wrong"
    assert found.text == "other keys give the same numbers"


def test_an_unexpected_error_is_no_refusal(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("lost")

    monkeypatch.setattr(torchleaf.TorchModule, "__call__", fail)
    report = torchleaf.check(nn.Linear(3, 2), X)
    assert (report["forward"].status, report["forward"].text) == ("error", "RuntimeError: lost")
    assert not report.ok


def test_comparisons():
    one = [np.ones(3, np.float32)]
    assert compare(one, one, "it") == 0
    for other in ([], [np.ones(2)], [np.array([1, 1, np.nan])], [np.array([1, 1, 1.01])]):
        with pytest.raises(WrongError, match="it"):
            compare(other, one, "it")
    assert compare([np.array([1, np.inf])], [np.array([1, np.inf])], "it") == 0
    with pytest.raises(WrongError, match=r"weight is off by 5.0e-01 at \[2\]: 1.5, torch has 1"):
        compare([np.array([1, 1, 1.5])], one, "it", names=["weight"])
