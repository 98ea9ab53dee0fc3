"""Programs replay functions that read values as long as they read the same ones, and run Python where they do not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from samples import as_torch
from scripted_layers import scripted
from torch import distributions, nn
from torchleaf import torch_function
from watching import Recorder

RUNS = 6
pytestmark = pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")


def inputs(run, sign=1):
    return sign * jnp.abs(jnp.asarray(np.random.default_rng(run).normal(size=(4, 3)), jnp.float32)) + sign * 0.1


def checked(x):
    assert not x.isnan().any()
    return x.tanh() * x


def branches(x):
    return x.sin() if bool((x > 0).all()) else x * 3


def several_reads(x):
    if (x > 0).all() and not torch.equal(x, x + 1) and not torch.allclose(x, x * 2):
        return x.exp()
    return x


def listed(x):
    return x * 2 if max((x > 0).flatten().tolist()) else x * 5


def counted(x):
    return x * int((x > 0).sum())


def log_prob(x):
    return distributions.Normal(x, x.abs() + 0.1).log_prob(x * 2)


def looped(x):
    for _ in range(3):
        if x.abs().max() > 100:
            break
        x = x * 1.5
    return x


STEADY = {f.__name__: f for f in (checked, branches, several_reads, listed, counted, log_prob, looped)}
steady = pytest.mark.parametrize("name", STEADY)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def gradient(function, x):
    leaf = as_torch(x).requires_grad_()
    (function(leaf) ** 2).sum().backward()
    return from_torch(leaf.grad)


@steady
def test_python_runs_no_more_where_the_values_are_the_same(name):
    recorder = Recorder(STEADY[name])
    program = jax.jit(torch_function(recorder))
    for run in range(RUNS):
        close(program(inputs(run)), from_torch(STEADY[name](as_torch(inputs(run)))))
    after = len(recorder.computed)
    for run in range(RUNS):
        close(program(inputs(run)), from_torch(STEADY[name](as_torch(inputs(run)))))
    assert len(recorder.computed) == after


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@steady
def test_nor_does_it_for_gradients(name, residuals):
    recorder = Recorder(STEADY[name])
    function = torch_function(recorder, residuals=residuals)
    step = jax.jit(jax.grad(lambda x: (function(x) ** 2).sum()))
    for run in range(RUNS):
        close(step(inputs(run)), gradient(STEADY[name], inputs(run)))
    after = len(recorder.computed)
    for run in range(RUNS):
        close(step(inputs(run)), gradient(STEADY[name], inputs(run)))
    assert len(recorder.computed) == after


@steady
def test_other_values_go_elsewhere(name):
    """In any run, forwards and backwards, and back again."""
    function = torch_function(STEADY[name])
    program, step = jax.jit(function), jax.jit(jax.grad(lambda x: (function(x) ** 2).sum()))
    for run, sign in enumerate([1, 1, 1, -1, 1, -1, -1, 1, 1]):
        x = inputs(run, sign)
        close(program(x), from_torch(STEADY[name](as_torch(x))))
        close(step(x), gradient(STEADY[name], x))


def test_values_that_are_refused():
    program = jax.jit(torch_function(checked))
    for run in range(RUNS):
        close(program(inputs(run)), from_torch(checked(as_torch(inputs(run)))))
        with pytest.raises((RuntimeError, ValueError), match="checked raised AssertionError"):
            jax.block_until_ready(program(inputs(run).at[0, 0].set(jnp.nan)))


def test_a_number_that_is_nan_each_time():
    recorder = Recorder(lambda x: x * 2 if x.log().sum().item() != 0 else x)
    program = jax.jit(torch_function(recorder))
    for run in range(RUNS):
        close(program(inputs(run, -1)), 2 * inputs(run, -1))
    assert len(recorder.computed) < 2 + 2 + RUNS


def test_numbers_that_are_others_each_time_are_read_each_time():
    """A replay that fails again and again is given up."""
    recorder = Recorder(lambda x: x * x.sum().item())
    program = jax.jit(torch_function(recorder))
    for run in range(40):
        close(program(inputs(run)), inputs(run) * inputs(run).sum())
    assert len(recorder.computed) >= 40

    flips = Recorder(branches)
    program = jax.jit(torch_function(flips))
    for run in range(80):
        x = inputs(run, 1 if run < 4 or run % 2 else -1)
        close(program(x), from_torch(branches(as_torch(x))))
    runs = len(flips.computed)
    for run in range(10):
        program(inputs(run)).block_until_ready()
    assert len(flips.computed) == runs + 10


def test_the_first_runs_may_differ():
    """Then another one is recorded."""
    recorder = Recorder(branches)
    program = jax.jit(torch_function(recorder))
    for run, sign in enumerate([1, -1, 1, 1, 1, 1]):
        close(program(inputs(run, sign)), from_torch(branches(as_torch(inputs(run, sign)))))
    after = len(recorder.computed)
    for run in range(RUNS):
        close(program(inputs(run)), jnp.sin(inputs(run)))
    assert len(recorder.computed) == after


def test_values_of_captured_tensors():
    factor, sizes = torch.tensor(2.0), torch.tensor([1, 3])

    def function(x):
        y = x * 2 if factor > 1 else x * 5
        return torch.cat([part.sum(0) for part in x.split(sizes.tolist())]) + y.sum()

    recorder = Recorder(function)
    program = jax.jit(torch_function(recorder))
    for run in range(RUNS):
        close(program(inputs(run)), from_torch(function(as_torch(inputs(run)))))
    after = len(recorder.computed)
    close(program(inputs(0)), from_torch(function(as_torch(inputs(0)))))
    assert len(recorder.computed) == after
    factor.fill_(0)
    close(program(inputs(0)), from_torch(function(as_torch(inputs(0)))))
    sizes.copy_(torch.tensor([3, 1]))
    close(program(inputs(0)), from_torch(function(as_torch(inputs(0)))))


def test_what_is_read_past_the_dispatcher_is_never_replayed():
    captured = torch.ones(3)
    functions = [
        lambda x: x * 2 if x.detach().numpy().sum() > 0 else x * 3,
        lambda x: x * (2 if (x > 0).all() and np.asarray(x.detach()).max() > 1 else 3),
        lambda x: x * float(captured.numpy()[0]),
    ]
    for function in functions:
        program = jax.jit(torch_function(function))
        for run, sign in enumerate([1, 1, 1, 1, -1, 1]):
            captured.fill_(run)
            close(program(inputs(run, sign)), from_torch(function(as_torch(inputs(run, sign)))))


def test_examples_of_a_loop_each_go_their_way():
    recorder = Recorder(branches)
    batched = jax.jit(jax.vmap(torch_function(recorder)))
    for run in range(RUNS):
        xs = jnp.stack([inputs(run), inputs(run, -1 if run == 4 else 1)])
        close(batched(xs), from_torch(torch.stack([branches(as_torch(x)) for x in xs])))
    after = len(recorder.computed)
    batched(jnp.stack([inputs(0), inputs(1)])).block_until_ready()
    assert len(recorder.computed) == after


def test_a_key_that_is_not_needed_is_no_obstacle():
    recorder = Recorder(checked)
    program = jax.jit(lambda x, key: torch_function(recorder)(x, key=key))
    for run in range(RUNS):
        close(program(inputs(run), jax.random.key(run)), from_torch(checked(as_torch(inputs(run)))))
    after = len(recorder.computed)
    program(inputs(0), jax.random.key(9)).block_until_ready()
    assert len(recorder.computed) == after


def test_random_numbers_are_never_replayed():
    def function(x):
        return torch.nn.functional.dropout(x) if bool((x > 0).all()) else x

    program = jax.jit(torch_function(function))
    results = {program(inputs(0), key=jax.random.key(run)).tobytes() for run in range(2 * RUNS)}
    assert len(results) == 2 * RUNS


def test_scripted_functions():
    compiled = scripted(branches)
    program = jax.jit(torch_function(lambda x: compiled(x)))
    for run, sign in enumerate([1, 1, 1, 1, -1, 1, -1, 1]):
        x = inputs(run, sign)
        close(program(x), from_torch(branches(as_torch(x))))


class Ema(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.runs = nn.Linear(3, 3), 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        RAN.append(type(x))
        if bool(x.isfinite().all()) and x.max() > 0:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return self.linear(x) - self.mean


RAN: list[type] = []


def test_state_of_modules_that_read_values():
    module = Ema()
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
    expected = torchleaf.to_torch_module(model, state)

    @eqx.filter_jit
    def step(model, x, state):
        def loss(params, state):
            y, state = eqx.tree_at(lambda m: m.params, model, params)(x, state=state)
            return (y**2).sum(), state

        return jax.grad(loss, has_aux=True)(model.params, state)

    for run, sign in enumerate([1, 1, 1, 1, -1, 1, -1, 1, 1]):
        x = inputs(run, sign)
        grads, state = step(model, x, state)
        expected.zero_grad()
        (expected(as_torch(x)) ** 2).sum().backward()
        close(grads, {name: from_torch(p.grad) for name, p in expected.named_parameters()})
        close(state.get(model.buffer_index)["mean"], from_torch(expected.mean))
    RAN.clear()
    jax.block_until_ready(step(model, inputs(0), state))
    assert not RAN
