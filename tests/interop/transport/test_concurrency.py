"""Several threads, devices and programs in one module at once, calls from within calls, interrupts and forks.

Each case has a process of its own, with torch's default number of threads; one that hangs is ended with a traceback.
The module is run on few rows, which is short work, and on many, which is long and handed to torch's thread.
"""

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.long

_SETUP = """
import faulthandler
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from torch import nn
from torch._subclasses.fake_tensor import is_fake

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
faulthandler.dump_traceback_later(60, exit=True)
torch.set_num_threads(max(2, torch.get_num_threads()))  # a machine of one core too
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
inputs = [torch.randn(ROWS, 64) * (1 + i) for i in range(8)]  # different in each thread or device
model, xs = torchleaf.TorchModule(module), [torchleaf.to_jax(x) for x in inputs]


def loss(model, x):
    return (model(x) ** 2).mean()


def torch_value_and_grad(*inputs):
    value = torch.stack([(module(x) ** 2).mean() for x in inputs]).mean()
    return [value.detach(), *torch.autograd.grad(value, list(module.parameters()))]


def check(result, *inputs):
    check_against(torch_value_and_grad(*inputs), result)


def check_against(expected, result):
    value, grads = result
    got = [value, *(grads.params[name] for name, _ in module.named_parameters())]
    for actual, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
"""

_EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.fixture(params=[2, 256], ids=["short", "long"])
def run(request):
    """Run a script with the module above."""

    def run(script: str, **environment: str) -> None:
        run_python(_SETUP.replace("ROWS", str(request.param)) + script, **environment)

    return run


# --- devices and threads -------------------------------------------------------------------------


def test_shard_map_on_eight_devices(run):
    script = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
weights, static = eqx.partition(model, eqx.is_array)
weights = jax.device_put(weights, NamedSharding(mesh, P()))


def one(weights, x):
    return loss(eqx.combine(weights, static), x[0])[None]


each = jax.shard_map(one, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"))
step = jax.jit(jax.value_and_grad(lambda weights, x: each(weights, x).mean()))
batch, expected = np.stack(xs), torch_value_and_grad(*inputs)
for _ in range(500 if len(inputs[0]) == 2 else 100):
    check_against(expected, step(weights, batch))
"""
    run(script, **_EIGHT_DEVICES)


def test_keys_and_state_on_eight_devices(run):
    """Dropout with a key for each device, batch statistics of each device's part: as in calls one by one."""
    script = """
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(64))
model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(layers)
weights, static = eqx.partition(model, eqx.is_array)


def one(weights, state, x, key):
    y, state = eqx.combine(weights, static)(x, state, key=key)
    return state, y


def each(weights, *parts):
    return jax.tree.map(lambda a: a[None], one(weights, *jax.tree.map(lambda a: a[0], parts)))


specs = (P(), P("i"), P("i"), P("i"))
step = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P("i")))
everywhere = jax.device_put(weights, NamedSharding(mesh, P()))
states = jax.device_put(torchleaf.stack([state] * 8), NamedSharding(mesh, P("i")))
single, batch, alone = jax.jit(one), np.stack(xs), [state] * 8
for i in range(20):
    keys = jax.random.split(jax.random.key(i), 8)
    states, ys = step(everywhere, states, batch, keys)
    assert len({np.asarray(y).tobytes() for y in ys}) == 8
    for d in range(8):
        alone[d], y = single(weights, alone[d], batch[d], keys[d])
        np.testing.assert_allclose(ys[d], y, rtol=1e-4, atol=1e-4)
for name, buffer in states.get(model.buffer_index).items():
    expected = np.stack([state.get(model.buffer_index)[name] for state in alone])
    np.testing.assert_allclose(buffer, expected, rtol=1e-4, atol=1e-5)
"""
    run(script, **_EIGHT_DEVICES)


def test_keys_and_state_in_many_threads(run):
    """One module, a key and a state of its own in each thread, eager and compiled: what each gives alone."""
    script = """
layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(64))
model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(layers)
compiled = eqx.filter_jit(lambda model, x, state, key: model(x, state, key=key))


def train(i):
    own, outputs = jax.tree.map(lambda leaf: leaf, state), []
    for key in jax.random.split(jax.random.key(i), 4):
        y, own = compiled(model, xs[i], own, key)
        y, own = model(y, own, key=key)
        outputs.append(np.asarray(y))
    return outputs, own.get(model.buffer_index)


alone = [train(i) for i in range(8)]
with ThreadPoolExecutor(8) as pool:
    for _ in range(2):
        for together, expected in zip(pool.map(train, range(8)), alone, strict=True):
            jax.tree.map(np.testing.assert_array_equal, together, expected)
"""
    run(script)


def test_one_program_on_each_of_eight_devices(run):
    script = """
devices = jax.devices()
weights, static = eqx.partition(model, eqx.is_array)
models = [eqx.combine(jax.device_put(weights, device), static) for device in devices]
step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
for _ in range(25):
    results = [step(m, jax.device_put(x, d)) for m, x, d in zip(models, xs, devices, strict=True)]
    for result, x in zip(results, inputs, strict=True):
        check(result, x)
"""
    run(script, **_EIGHT_DEVICES)


@pytest.mark.parametrize("jit", ["eqx.filter_jit", ""], ids=["jit", "eager"])
def test_gradients_in_many_threads(run, jit):
    script = f"""
step = {jit}(eqx.filter_value_and_grad(loss))
with ThreadPoolExecutor(8) as pool:
    for _ in range(25):
        for result, x in zip(pool.map(lambda x: step(model, x), xs), inputs, strict=True):
            check(result, x)
"""
    run(script)


@pytest.mark.parametrize("own", [True, False], ids=["the callable's own", "ours"])
def test_forward_mode_in_many_threads(run, own):
    """The levels of torch's forward mode are the process's: one thread's end is not to be another's."""
    script = """
def slope(x):
    return torch.func.jvp(module, (x,), (torch.ones_like(x),))[1] if OWN else module(x)


ours = torchleaf.torch_function(slope, replay=False)
program = jax.jit(lambda x: ours(x) if OWN else jax.jvp(ours, (x,), (jnp.ones_like(x),))[1])
with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of TorchScript
    expected = [torch.func.jvp(module, (x,), (torch.ones_like(x),))[1].numpy() for x in inputs]
program(xs[0])
with ThreadPoolExecutor(8) as pool:
    for _ in range(40):
        for result, wanted in zip(pool.map(program, xs), expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)
"""
    run(script.replace("OWN", str(own)))


def test_first_runs_in_many_threads(run):
    """One thread makes the proof that a plan is right, the others wait for it."""
    script = """
hooked = torchleaf.torch_function(lambda x: hook(module(x)).sum())


def hook(y):
    if y.requires_grad:
        y.register_hook(lambda g: 3 * g)  # not attached by torch.func.vmap
    return y


with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
    warnings.simplefilter("always")
    gradient = jax.jit(jax.grad(lambda x: jax.vmap(hooked)(x).sum()))
    results = list(pool.map(gradient, xs))
for result, x in zip(results, inputs, strict=True):
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    np.testing.assert_allclose(result, 3 * x.grad, rtol=1e-4, atol=1e-5)
assert sum("runs as a loop" in str(w.message) for w in caught) == 1
"""
    run(script)


def test_two_programs_of_one_module_in_two_threads(run):
    script = """
def train(i, loss, factor):
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    for _ in range(200):
        value, grads = step(model, xs[i])
        check((value / factor, jax.tree.map(lambda g: g / factor, grads)), inputs[i])


with ThreadPoolExecutor(2) as pool:
    for done in [pool.submit(train, 0, loss, 1.0), pool.submit(train, 1, lambda m, x: 3 * loss(m, x), 3.0)]:
        done.result()
"""
    run(script)


def test_backward_in_another_thread(run):
    script = """
with ThreadPoolExecutor(1) as forward, ThreadPoolExecutor(1) as backward:
    for _ in range(10):
        runs = [forward.submit(eqx.filter_vjp, loss, model, x) for x in xs]
        pulled = [(run.result()[0], backward.submit(run.result()[1], jnp.ones(()))) for run in runs]
        for (value, grads), x in zip(pulled, inputs, strict=True):
            check((value, grads.result()[0]), x)
assert torchleaf.interop.calls.residuals.live_graphs() == 0
"""
    run(script)


# --- calls within calls, errors, interrupts, forks ------------------------------------------------


@pytest.mark.parametrize("inner", ["jax.jit(lambda x: model(x * 1.0))", "model"], ids=["jit", "eager"])
def test_call_within_a_call(run, inner):
    script = f"""
inner = {inner}
inner(xs[0])


def outer(x):
    y = module(x)
    return y if is_fake(x) else y + torchleaf.to_torch(inner(torchleaf.to_jax(y)), copy=True)


step = jax.jit(lambda x: jnp.negative(torchleaf.torch_function(outer)(x * 1.0)))
with ThreadPoolExecutor(4) as pool:
    for _ in range(5):
        for got, x in zip(pool.map(step, xs), inputs, strict=True):
            with torch.no_grad():
                expected = -(module(x) + module(module(x)))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
"""
    run(script)


@pytest.mark.parametrize("error", ["ValueError", "SystemExit", "KeyboardInterrupt"])
def test_errors_of_any_kind_leave_the_process_usable(run, error):
    script = f"""
failing = False


def function(x):
    if failing:
        raise {error}("stop")
    return module(x)


step = jax.jit(lambda x: torchleaf.torch_function(function)(x * 1.0))
before = np.asarray(step(xs[0]))
failing = True
try:
    jax.block_until_ready(step(xs[0]))
except BaseException as exc:
    assert "stop" in str(exc)
else:
    raise AssertionError("the error was lost")
failing = False
np.testing.assert_array_equal(step(xs[0]), before)
check(eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, xs[0]), inputs[0])
"""
    run(script)


@pytest.mark.parametrize("jit", ["jax.jit", ""], ids=["jit", "eager"])
def test_ctrl_c_leaves_the_process_usable(run, jit):
    script = f"""
slow, started = False, threading.Event()


def function(x):
    y = module(x)
    if slow:
        started.set()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            np.testing.assert_array_equal(module(x).detach(), y.detach())  # x is still the caller's
    return y


step = {jit}(torchleaf.torch_function(function, replay=False))
x = jnp.asarray(xs[0])
before = np.asarray(step(x))
for _ in range(2):
    slow = True
    started.clear()
    interrupter = threading.Thread(
        target=lambda: (started.wait(), time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT))
    )
    interrupter.start()
    try:
        jax.block_until_ready(step(jnp.array(x)))
        time.sleep(1)
        interrupted = False
    except BaseException:  # JAX makes an error of its own of one inside a call
        interrupted = True
    assert interrupted, "the interrupt was lost"
    interrupter.join()
    slow = False
    for _ in range(20):
        np.testing.assert_array_equal(step(x), before)
    check(eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, xs[0]), inputs[0])
"""
    run(script)


def test_program_within_a_call_is_not_kept_waiting():
    """XLA runs the inner program's torch calls on threads of its own, while the outer call waits for them."""
    run_python(
        _SETUP.replace("ROWS", "2")
        + """
softmax = torchleaf.torch_function(lambda x: torch.softmax(x @ x, -1))
inner = jax.jit(jax.grad(lambda x: (softmax(jnp.sin(x) @ x) * jnp.cos(x) + softmax(x * 2)).sum()))


def outer(x):
    return x if is_fake(x) else torchleaf.to_torch(inner(torchleaf.to_jax(x @ x)), copy=True)


step = jax.jit(lambda x: torchleaf.torch_function(lambda x: outer(x) + x @ x)(x * 1.0))
x = jax.random.normal(jax.random.key(0), (512, 512)) / 32
expected = inner(x @ x) + x @ x
jax.block_until_ready(step(x))
began = time.monotonic()
for _ in range(5):
    np.testing.assert_allclose(step(x), expected, rtol=1e-3, atol=1e-4)
assert time.monotonic() - began < 10
"""
    )


def test_torch_works_in_a_forked_child(run):
    script = """
check(eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, xs[0]), inputs[0])
with torch.no_grad():
    expected = module(inputs[0])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX's, about threads and forks
    child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork: it hangs without torchleaf too
    with torch.no_grad():
        same = torch.allclose(module(inputs[0]), expected, atol=1e-5)
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
check(eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, xs[1]), inputs[1])
"""
    run(script)
