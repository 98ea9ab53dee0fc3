"""Memory: training steps leave nothing behind, `jax.checkpoint` and `residuals="recompute"` keep the peak low.

Each measurement runs in a process of its own, in which large blocks come straight from the system and go straight
back, so that resident memory is memory in use.
"""

import json
from pathlib import Path

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.long

MIB = 2**20
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

_IMPORTS = f"""
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
import torchleaf
from torch import nn

sys.path.append({str(BENCHMARKS)!r})
import memory


def checkpointed(model, x):
    weights, static = eqx.partition(model, eqx.is_array)
    return jax.checkpoint(lambda weights, x: eqx.combine(weights, static)(x))(weights, x)


def run(step):
    jax.block_until_ready(jax.tree.leaves(step()))
"""


def _measured(script: str) -> list[int]:
    """The numbers a script prints."""
    return json.loads(run_python(_IMPORTS + script, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_=str(MIB // 32)))


# --- growth --------------------------------------------------------------------------------------

_STEPS = 2000
_ACTIVATION = MIB // 16
"""What a step would leave behind: 125 MiB after all steps."""

_LEFT_BEHIND = 8 * MIB
"""What the process may grow by; JAX's own eager stop_gradient leaves 4 MiB of 2,000 steps."""

_GROWTH = f"""
from torchleaf.interop.calls.residuals import live_graphs

model = torchleaf.TorchModule(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))  # tanh saves its output, the layer its input
x = jnp.ones(({_ACTIVATION} // 8, 2))


def plain(model):
    return (model(x) ** 2).sum()


def ignores_output(model):
    model(x)
    return model.params["0.bias"].sum()


def stops_gradient(model):
    return jax.lax.stop_gradient(model(x)).sum() * model.params["0.bias"].sum()


def returns_aux(model):
    return model.params["0.bias"].sum(), model(x)


def checkpoint(model):
    return (checkpointed(model, x) ** 2).sum()


def gradient(loss):
    return eqx.filter_grad(loss, has_aux=loss is returns_aux)


def dropped_pullback(model):
    return eqx.filter_vjp(plain, model)[0]


def growth(function):
    graphs = 0
    for _ in range(100):
        run(lambda: function(model))
    memory.settle()
    before = memory.reset_peak()
    for _ in range({_STEPS}):
        run(lambda: function(model))
        graphs = max(graphs, live_graphs())
    memory.settle()
    print(json.dumps([memory.reset_peak() - before, graphs]))
"""

_TRAINING_STEPS = [
    f"{jit}(gradient({loss}))"
    for jit in ("eqx.filter_jit", "")
    for loss in ("plain", "ignores_output", "stops_gradient", "returns_aux")
]


@pytest.mark.parametrize("step", [*_TRAINING_STEPS, "eqx.filter_jit(dropped_pullback)", "dropped_pullback"])
def test_training_steps_leave_nothing_behind(step):
    _check_growth(step)


@pytest.mark.usefixtures("each_remat")
@pytest.mark.parametrize("jit", ["eqx.filter_jit", ""], ids=["jit", "eager"])
def test_checkpointed_steps_leave_nothing_behind(jit):
    _check_growth(f"{jit}(gradient(checkpoint))")


def _check_growth(step: str) -> None:
    growth, graphs = _measured(f"{_GROWTH}\ngrowth({step})")
    assert graphs == 0, "a graph was left after a step"
    assert growth < _LEFT_BEHIND


# --- peak ----------------------------------------------------------------------------------------

_WIDE = 2 * MIB
"""One activation of the chains below."""

_PEAK = f"""
def chain(modules, layers):
    return [nn.Sequential(*(f() for f in [lambda: nn.Linear(64, 64), nn.Tanh] * layers)) for _ in range(modules)]


x = torch.randn({_WIDE} // 256, 64)


def native(modules):
    def step():
        y = x
        for module in modules:
            y = module(y)
        return [g.numpy() for g in torch.autograd.grad((y**2).mean(), [p for m in modules for p in m.parameters()])]

    return step


def torchleaf_chain(modules, residuals, segment=None, transform=eqx.filter_jit):
    models = [torchleaf.TorchModule(module, residuals=residuals) for module in modules]
    if segment is not None:
        models = [eqx.nn.Sequential(models[i : i + segment]) for i in range(0, len(models), segment)]

    def loss(models, x):
        for model in models:
            x = model(x) if segment is None else checkpointed(model, x)
        return (x**2).mean()

    gradient = transform(eqx.filter_grad(loss))
    return lambda: gradient(models, torchleaf.to_jax(x))


def peak(step):
    for _ in range(2):
        run(step)
    memory.settle()
    at_rest = memory.reset_peak()
    run(step)
    return memory.peak() - at_rest


def peaks(*steps):
    print(json.dumps([peak(step) for step in steps]))
"""


JIT, EAGER = "eqx.filter_jit", "lambda step: step"


@pytest.mark.usefixtures("each_remat")
@pytest.mark.parametrize(
    ("residuals", "transform"),
    [
        ("live", JIT),
        ("live", EAGER),
        ("recompute", EAGER),
    ],  # XLA merges equal forward calls under jit, as it does jnp's
    ids=["live-jit", "live-eager", "recompute-eager"],
)
def test_checkpoint_lowers_the_peak(residuals, transform):
    script = f"""
modules = chain(12, layers=1)
options = dict(residuals={residuals!r}, transform={transform})
peaks(torchleaf_chain(modules, **options), torchleaf_chain(modules, segment=3, **options))
"""
    whole, in_segments = _measured(_PEAK + script)
    assert in_segments < whole - 3 * _WIDE


@pytest.mark.parametrize("layers", [1, 4])
def test_recompute_needs_no_more_memory_than_torch(layers):
    script = f"""
modules = chain(8, layers={layers})
peaks(native(modules), torchleaf_chain(modules, residuals="recompute"))
"""
    native, recompute = _measured(_PEAK + script)
    assert native > 8 * layers * _WIDE, "the measurement sees the activations torch saves"
    assert recompute < native + _WIDE // 4
