"""`torchleaf.check`: it finds nothing where there is nothing, and faults where there are some."""

import itertools
import os
import random
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import torchleaf.linen
import torchleaf.nnx
from flax import nnx
from torch import nn
from torchleaf.interop import dtypes
from torchleaf.layers.check.command import main
from torchleaf.layers.check.numbers import WrongError, compare

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)

FIRST_ORDER = ["forward", "gradients", "finite differences", "forward mode", "vmap", "vmap of gradients"]
EVERY = [*FIRST_ORDER, "Hessian-vector products", "state", "keys"]


def statuses(report):
    return {outcome.name: outcome.status for outcome in report.outcomes}


def expected(**others):
    """All is ok, but where said otherwise."""
    named = {name.replace("_", " "): status for name, status in others.items()}
    return {**dict.fromkeys(EVERY, "ok"), "state": "n/a", "keys": "n/a", **named}


FRAMEWORKS = {
    "Equinox": torchleaf.TorchModule,
    "Linen": torchleaf.linen.TorchModule,
    "NNX": torchleaf.nnx.TorchModule,
    "torch": lambda module: module,
}


@pytest.fixture(params=FRAMEWORKS)
def wrap(request):
    return FRAMEWORKS[request.param]


# --- where all is well -----------------------------------------------------------------------------


def test_module(wrap):
    report = torchleaf.check(wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), X)
    assert statuses(report) == expected(), report
    assert report.ok
    assert all(outcome.error < 1e-5 and outcome.seconds > 0 for outcome in report.outcomes if outcome.status == "ok")
    assert str(report).endswith("All is as in torch.")


def test_state(wrap):
    report = torchleaf.check(wrap(nn.BatchNorm1d(3)), X)
    shared = "examples cannot share state that each changes"
    assert statuses(report) == expected(vmap="n/a", vmap_of_gradients="n/a", state="ok"), report
    assert report["vmap"].text == shared
    assert report.ok


def test_state_of_an_equinox_model_with_its_state_apart():
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(nn.BatchNorm1d(3))
    assert torchleaf.check(model, X, state)["state"].status == "ok"
    with pytest.raises(torchleaf.StateError, match=r"Pass it"):
        torchleaf.check(model, X)


def test_randomness(wrap):
    report = torchleaf.check(wrap(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))), X)
    assert statuses(report) == expected(keys="slow"), report
    assert "draws random numbers" in report["keys"].text
    assert "no key was given" in str(report)
    assert report.ok


def test_randomness_with_a_key():
    report = torchleaf.check(nn.Dropout(), X, key=jax.random.key(1))
    assert report["keys"].status == "slow"
    assert "no key was given" not in str(report)


def test_evaluation_mode_draws_nothing():
    dropout = eqx.nn.inference_mode(torchleaf.TorchModule(nn.Dropout()))
    assert statuses(torchleaf.check(dropout, X)) == expected()
    assert statuses(torchleaf.check(torchleaf.linen.TorchModule(nn.Dropout(), train=False), X)) == expected()


def test_what_always_draws_is_checked_by_keys_alone():
    report = torchleaf.check(lambda x: x + x * torch.randn_like(x), X)
    assert {name for name, status in statuses(report).items() if status == "n/a"} == {*EVERY} - {"keys"}
    assert report["forward"].text == "it draws random numbers; see 'keys'"
    assert report["keys"].status == "slow"


@pytest.mark.parametrize("made", [False, True], ids=["torch function", "torch_function"])
def test_function_of_pytrees_and_static_values(made):
    def function(tree, power, *, scale=2.0):
        return {"y": tree["x"].sin() ** power * scale, "n": tree["n"] + 1}

    args = {"x": torch.tensor([0.3, 1.2]), "n": np.arange(2)}
    report = torchleaf.check(torchleaf.torch_function(function) if made else function, args, 2)
    assert statuses(report) == expected(), report


@pytest.mark.parametrize("framework", [torchleaf.linen, torchleaf.nnx], ids=["Linen", "NNX"])
def test_channels_last(framework):
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    report = torchleaf.check(framework.TorchModule(nn.Conv2d(3, 2, 2), channels_last=True), images)
    assert statuses(report) == expected(), report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    report = torchleaf.check(nn.Linear(3, 2, dtype=dtype), X.astype(dtypes.canonical(dtype)))
    assert statuses(report) == expected(), report


def test_frozen_parameters_and_whole_numbers_only():
    embedding = nn.Embedding(5, 2).requires_grad_(False)
    report = torchleaf.check(embedding, jnp.array([0, 3, 1]))
    assert report["gradients"].status == "n/a"
    assert report["forward"].status == report["vmap"].status == "ok"


def test_arguments_that_have_no_others_nearby():
    def entropy(p):
        return torch.distributions.Categorical(probs=torch.clamp(p, 0, 0.5)).entropy() if p.sum() == 1 else 1 / 0

    report = torchleaf.check(entropy, jnp.array([0.25, 0.25, 0.5]))
    assert "All calls get the same arguments" in str(report)
    assert report["forward"].status in ("ok", "slow")


def test_straight_through_estimators_are_no_fault():
    report = torchleaf.check(lambda x: x + (x.round() - x).detach(), 3 * X)
    assert report["finite differences"].status == "n/a"
    assert "round" in report["finite differences"].text
    assert report.ok


def test_without_forward_mode():
    model = torchleaf.TorchModule(nn.Linear(3, 2), forward_mode=False)
    assert statuses(torchleaf.check(model, X)) == expected(forward_mode="n/a")


# --- slow, and refused -----------------------------------------------------------------------------


class ReadsValues(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x * 3


def test_a_loop_is_slow_with_the_reason():
    report = torchleaf.check(ReadsValues(), X + 1)
    assert report["vmap"].status == report["vmap of gradients"].status == "slow"
    assert "runs as a loop over 3 examples" in report["vmap"].text
    assert "reads values" in report["vmap"].text
    assert "vmap_method='batched'" in report["vmap"].text  # the remedy
    assert report.ok
    assert "2 slow" in str(report)


def test_what_the_user_ran_before_hides_no_remark():
    model = torchleaf.TorchModule(ReadsValues())
    with pytest.warns(UserWarning, match="runs as a loop"):
        jax.vmap(model)(jnp.stack([X, X + 1]))
    assert torchleaf.check(model, X + 1)["vmap"].status == "slow"


def test_a_refusal_has_the_remedy():
    report = torchleaf.check(lambda x: x[x > 0], X)
    assert not report.ok
    outcome = report["gradients"]
    assert outcome.status == "refused"
    assert "nonzero" in outcome.text
    assert "Pass `out_shape=`" in outcome.text
    assert "As 'gradients'." in str(report)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_state_that_is_lost_is_refused():
    report = torchleaf.check(Counts(), X)
    assert report["forward"].status == "refused"
    assert "register_buffer" in report["forward"].text


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.exp()


def test_what_torch_cannot_do_itself_is_not_refused():
    report = torchleaf.check(lambda x: Once.apply(x), X)
    outcome = report["Hessian-vector products"]
    assert outcome.status == "n/a"
    assert "torch cannot: its double backward" in outcome.text
    assert report.ok


# --- faults that it finds --------------------------------------------------------------------------


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
    outcome = report["finite differences"]
    assert outcome.status == "wrong"
    assert "torch's own gradient is not the derivative" in outcome.text
    assert report["gradients"].status == "ok"  # they are torch's


def test_a_function_that_treats_a_batch_as_a_whole():
    centre = torchleaf.torch_function(lambda x: x - x.mean(), vmap_method="batched")
    report = torchleaf.check(centre, X)
    assert report["vmap"].status == "wrong"
    assert "run 1: array 0 is off by" in report["vmap"].text
    assert report["forward"].status == "ok"


def test_a_function_that_is_not_pure():
    numbers = itertools.count(1)
    report = torchleaf.check(lambda x: x * next(numbers), X)
    assert report["forward"].status == "wrong"
    assert "run 1: output 0 is off by" in report["forward"].text


def perturb(monkeypatch, owner, name, change):
    before = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(before(*args, **kwargs)))


def off(outs):
    """The first output is off by a thousandth."""
    return (outs[0] * 1.001, *outs[1:])


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        ("call.Base", "compute", "forward"),
        ("graph.Graph", "pullback", "gradients"),
        ("derivative", "_forward_mode", "forward mode"),
        ("batching.Vmap", "compute", "vmap"),
    ],
)
def test_faults_of_torchleaf(monkeypatch, where, name, wrong):
    """Wrong numbers at each place of the machinery, in every call so that no comparison of its own would show them."""
    module, _, cls = where.partition(".")
    owner = sys.modules[f"torchleaf.interop.{module}"]
    perturb(monkeypatch, getattr(owner, cls) if cls else owner, name, off)
    monkeypatch.setattr("torchleaf.interop.choice.disagreement", lambda call, plan, tensors: None)
    report = torchleaf.check(nn.Linear(3, 2), X)
    assert report[wrong].status == "wrong", report
    assert not report.ok
    assert "off by 1.0e-03" in report[wrong].text


def test_a_fault_of_replays_alone(monkeypatch):
    """The first two runs are right."""
    replay = torchleaf.interop.call.TorchCall.replay

    def faulty(self, operands, results):
        done = replay(self, operands, results)
        if done:
            results[0].mul_(1.001)
        return done

    monkeypatch.setattr(torchleaf.interop.call.TorchCall, "replay", faulty)
    outcome = torchleaf.check(nn.Linear(3, 2), X)["forward"]
    assert outcome.status == "wrong"
    assert "compiled, run 3" in outcome.text


def test_a_fault_of_state(monkeypatch):
    with_buffers = torchleaf.TorchModule.with_buffers

    def faulty(self, state, changed):
        return with_buffers(self, state, {n: x * 1.01 if x.ndim else x for n, x in changed.items()})

    monkeypatch.setattr(torchleaf.TorchModule, "with_buffers", faulty)
    outcome = torchleaf.check(nn.BatchNorm1d(3), X)["state"]
    assert outcome.status == "wrong"
    assert "buffer `running_mean`" in outcome.text


def test_a_fault_of_keys(monkeypatch):
    """Numbers that do not depend on the key."""
    monkeypatch.setattr("torchleaf.interop.random._seed", lambda words: 7)
    outcome = torchleaf.check(nn.Dropout(), X)["keys"]
    assert outcome.status == "wrong"
    assert outcome.text == "other keys give the same numbers"


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


# --- nothing of the user's changes -----------------------------------------------------------------


def test_nothing_changes(wrap):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[2].eval()
    model = wrap(module)
    argument = torch.ones(5, 3) * torch.arange(5)[:, None]
    before = {name: x.clone() for name, x in module.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    leaves = jax.tree.map(jnp.copy, nnx.state(model)) if isinstance(model, nnx.Module) else None
    torchleaf.check(model, argument)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert [part.training for part in module.modules()] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]
    assert torch.get_default_dtype() == torch.float32
    assert not jax.config.jax_enable_x64
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in module.parameters())
    assert not argument.requires_grad
    if leaves is not None:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), leaves, nnx.state(model)))


def test_the_users_modes_do_not_matter():
    with torch.no_grad():
        assert statuses(torchleaf.check(nn.Linear(3, 2), X)) == expected()
        assert not torch.is_grad_enabled()


# --- arguments -------------------------------------------------------------------------------------


def test_arguments_that_torch_refuses():
    with pytest.raises(ValueError, match=r"torch itself fails on Linear.*mat1 and mat2"):
        torchleaf.check(nn.Linear(3, 2), jnp.ones((5, 4)))


@pytest.mark.parametrize("given", [nn.Linear, 3, "module"], ids=str)
def test_what_is_no_module(given):
    with pytest.raises(TypeError, match=r"module_or_fn must be a torch.nn.Module, a torch function"):
        torchleaf.check(given, X)


def test_lazy_modules():
    with pytest.raises(TypeError, match="lazy"):
        torchleaf.check(nn.LazyLinear(2), X)


def test_under_a_transformation():
    with pytest.raises(TypeError, match="outside of JAX's transformations"):
        jax.jit(lambda x: torchleaf.check(nn.Linear(3, 2), x))(X)


def test_outcomes_by_name():
    report = torchleaf.check(lambda x: x + 1, X)
    with pytest.raises(KeyError, match="forward"):
        report["backward"]


# --- the command -----------------------------------------------------------------------------------

FACTORIES = """
import torch

def good():
    return torch.nn.Linear(3, 2), torch.ones(4, 3)

def function():
    return torch.sin, torch.ones(3)

def refused():
    return (lambda x: x[x > 0]), torch.ones(3)

def number():
    return 3

def misfit():
    return torch.nn.Linear(3, 2), torch.ones(4, 5)

pair = (torch.nn.Identity(), torch.ones(2))
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("factories", None)


def test_command(factories):
    """Modules of the current directory can be named."""
    command = [sys.executable, "-m", "torchleaf", "check", "factories:good"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=factories, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Linear (Equinox)\n\nok       forward")


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("factories:function", 0, "All is as in torch."),
        ("factories:pair", 0, "Identity (Equinox)"),
        ("factories:refused", 1, "Pass `out_shape=`"),
        ("factories", 2, "'factories' is no `package.module:factory`"),
        ("factories:none", 2, "factories has no 'none'; it has function, good, misfit, number, refused."),
        ("nowhere:good", 2, "There is no module 'nowhere'"),
        ("factories:number", 2, "factories:number gives int; expected a module or function, or a tuple"),
        ("factories:misfit", 2, "torch itself fails on Linear"),
    ],
)
def test_command_line(factories, capsys, name, status, said):
    assert main([name]) == status
    assert said in " ".join(capsys.readouterr().out.split())


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: python -m torchleaf check") == 2


def test_a_module_that_imports_one_there_is_not(factories):
    (factories / "factories.py").write_text("import nowhere")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        main(["factories:good"])
