"""`torchleaf.check` of modules and functions: what is as in torch, what is slow, what is refused; nothing changes."""

import random

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import torchleaf.linen
import torchleaf.nnx
from checking import X, outcome
from flax import nnx
from torch import nn
from torchleaf.interop.values import dtypes
from torchleaf.layers.check.given import Given
from torchleaf.layers.check.kinds import kind_of

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


@pytest.mark.long
def test_module(wrap):
    report = torchleaf.check(wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), X)
    assert statuses(report) == expected(), report
    assert report.ok
    assert all(found.error < 1e-5 and found.seconds > 0 for found in report.outcomes if found.status == "ok")
    assert str(report).endswith("All is as in torch.")


def test_state(wrap):
    assert outcome("state", wrap(nn.BatchNorm1d(3)), X).status == "ok"


@pytest.mark.long
def test_an_equinox_model_with_its_state_apart():
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(nn.BatchNorm1d(3))
    report = torchleaf.check(model, X, state)
    assert statuses(report) == expected(vmap="n/a", vmap_of_gradients="n/a", state="ok"), report
    assert report["vmap"].text == "examples cannot share state that each changes"
    with pytest.raises(torchleaf.StateError, match=r"Pass it"):
        torchleaf.check(model, X)


@pytest.mark.long
def test_randomness(wrap):
    found = outcome("keys", wrap(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))), X)
    assert found.status == "slow", found
    assert "draws random numbers" in found.text


def test_modules_that_draw():
    report = torchleaf.check(nn.Dropout(), X)
    assert statuses(report) == expected(keys="slow"), report
    assert "no key was given" in str(report)
    assert report.ok


def test_the_key_is_the_users():
    subject = Given(kind_of(nn.Dropout(), None), (X,), jax.random.key(1))
    assert subject.key() == jax.random.key(1)
    assert not any("no key was given" in note for note in subject.notes)


def test_evaluation_mode_draws_nothing():
    model = torchleaf.nnx.TorchModule(nn.Dropout())
    model.eval()
    equinox = eqx.nn.inference_mode(torchleaf.TorchModule(nn.Dropout()))
    for dropout in (equinox, torchleaf.linen.TorchModule(nn.Dropout(), train=False), model):
        assert outcome("keys", dropout, X).status == "n/a"


@pytest.mark.long
def test_what_always_draws_is_checked_by_keys_alone():
    report = torchleaf.check(lambda x: x + x * torch.randn_like(x), X)
    assert {name for name, status in statuses(report).items() if status == "n/a"} == {*EVERY} - {"keys"}
    assert report["forward"].text == "it draws random numbers; see 'keys'"
    assert report["keys"].status == "slow"


@pytest.mark.long
def test_function_of_pytrees_and_static_values():
    def function(tree, power, *, scale=2.0):
        return {"y": tree["x"].sin() ** power * scale, "n": tree["n"] + 1}

    args = {"x": torch.tensor([0.3, 1.2]), "n": np.arange(2)}
    report = torchleaf.check(function, args, 2)
    assert statuses(report) == expected(), report
    assert outcome("gradients", torchleaf.torch_function(function), args, 2).status == "ok"


@pytest.mark.long
@pytest.mark.parametrize("framework", [torchleaf.linen, torchleaf.nnx], ids=["Linen", "NNX"])
def test_channels_last(framework):
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    for name in ("forward", "gradients", "vmap"):
        assert outcome(name, framework.TorchModule(nn.Conv2d(3, 2, 2), channels_last=True), images).status == "ok"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    module, x = nn.Linear(3, 2, dtype=dtype), X.astype(dtypes.canonical(dtype))
    for name in FIRST_ORDER:
        assert outcome(name, module, x).status == "ok"


def test_frozen_parameters_and_whole_numbers_only():
    embedding = nn.Embedding(5, 2).requires_grad_(False)
    for name, status in {"gradients": "n/a", "forward": "ok", "vmap": "ok"}.items():
        assert outcome(name, embedding, jnp.array([0, 3, 1])).status == status


def test_arguments_that_have_no_others_nearby():
    def entropy(p):
        return torch.distributions.Categorical(probs=torch.clamp(p, 0, 0.5)).entropy() if p.sum() == 1 else 1 / 0

    report = torchleaf.check(entropy, jnp.array([0.25, 0.25, 0.5]))
    assert "All calls get the same arguments" in str(report)
    assert report["forward"].status in ("ok", "slow")


def test_straight_through_estimators_are_no_fault():
    found = outcome("finite differences", lambda x: x + (x.round() - x).detach(), 3 * X)
    assert found.status == "n/a"
    assert "round" in found.text


def test_symmetric_matrices_are_moved_among_their_like():
    """torch's formulas for them tell no other derivatives."""
    matrix = X.T @ X
    for name in ("forward", "finite differences", "forward mode", "Hessian-vector products"):
        assert outcome(name, torch.linalg.cholesky, matrix).status in ("ok", "slow")


def test_detached_parts_stay_so_in_second_derivatives():
    assert outcome("Hessian-vector products", lambda x: x.detach() * x, X).status == "ok"


def test_without_forward_mode():
    model = torchleaf.TorchModule(nn.Linear(3, 2), forward_mode=False)
    assert outcome("forward mode", model, X).status == "n/a"
    assert outcome("Hessian-vector products", model, X).status == "ok"  # reverse over reverse


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


@pytest.mark.long
def test_ops_that_torch_computes_for_the_other_engine_are_named():
    def spectrum(x):
        return torch.linalg.eigvals(x.sin() / 4 + torch.diag(torch.arange(1.0, 3.0))).real

    x = jnp.asarray([[1.0, 2.0], [-1.0, 3.0]])
    report = torchleaf.check(torchleaf.torch_function(spectrum, engine="xla"), x)
    assert report.ok, report
    assert report["forward"].status == "slow"
    assert "spectrum: torch computes linalg_eig.default within XLA's program" in report["forward"].text
    assert torchleaf.check(torchleaf.torch_function(torch.sin, engine="xla"), x)["forward"].status == "ok"


def test_what_the_user_ran_before_hides_no_remark():
    model = torchleaf.TorchModule(ReadsValues())
    with pytest.warns(UserWarning, match="runs as a loop"):
        jax.vmap(model)(jnp.stack([X, X + 1]))
    assert outcome("vmap", model, X + 1).status == "slow"


def test_a_refusal_has_the_remedy():
    report = torchleaf.check(lambda x: x[x > 0], X)
    assert not report.ok
    found = report["gradients"]
    assert found.status == "refused"
    assert "nonzero" in found.text
    assert "Pass `out_shape=`" in found.text
    assert "As 'gradients'." in str(report)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_state_that_is_lost_is_refused():
    found = outcome("forward", Counts(), X)
    assert found.status == "refused"
    assert "register_buffer" in found.text


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
    found = outcome("Hessian-vector products", lambda x: Once.apply(x), X)
    assert found.status == "n/a"
    assert "torch cannot: its double backward" in found.text


# --- nothing of the user's changes -----------------------------------------------------------------


@pytest.mark.long
def test_nothing_changes(wrap):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[2].eval()
    model = wrap(module)
    argument = torch.ones(5, 3) * torch.arange(5)[:, None]
    before = {name: x.clone() for name, x in module.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    leaves = jax.tree.map(jnp.copy, nnx.state(model)) if isinstance(model, nnx.Module) else None
    for name in EVERY if model is module else ("gradients", "state", "keys"):
        assert outcome(name, model, argument).status in ("ok", "slow", "n/a")
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
        assert outcome("gradients", nn.Linear(3, 2), X).status == "ok"
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


@pytest.mark.long
def test_outcomes_by_name():
    report = torchleaf.check(lambda x: x + 1, X)
    with pytest.raises(KeyError, match="forward"):
        report["backward"]
