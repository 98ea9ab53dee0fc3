"""Torch calls beyond the life of one process: compilation caches on disk, forked children, the interpreter's exit."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from fresh_process import run_python

pytestmark = pytest.mark.long

# --- JAX's persistent compilation cache --------------------------------------------------------------

_CACHED = """
import secrets

number = NUMBER
if number is not None:
    secrets.randbits = lambda n: number  # where torchleaf numbers its programs from

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name) if "cache_hit" in name else None)

x = jnp.linspace(0.1, 1.0, 64).reshape(8, 8)
module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ACTIVATION())
weights, static = eqx.partition(torchleaf.TorchModule(module), eqx.is_array)
function = torchleaf.torch_function(lambda x: torch.TORCH(x @ x))
dropout = torchleaf.torch_function(lambda x: torch.nn.functional.dropout(torch.TORCH(x), RATE))


@jax.jit
def program(weights, x, keys):
    gradient = jax.grad(lambda x: eqx.combine(weights, static)(x).sum())(x)
    return function(jnp.sin(x)), gradient, jax.vmap(lambda x, key: dropout(x, key=key))(x, keys)


y, gradient, dropped = program(weights, x, jax.random.split(jax.random.key(0), 8))
np.testing.assert_allclose(y, np.TORCH(np.sin(x) @ np.sin(x)), rtol=1e-4)
expected = torch.from_numpy(np.array(x)).requires_grad_()
module(expected).sum().backward()
np.testing.assert_allclose(gradient, expected.grad, rtol=1e-4, atol=1e-5)
kept = np.asarray(dropped) != 0
np.testing.assert_allclose(dropped, np.where(kept, np.TORCH(x) / (1 - RATE), 0), rtol=1e-4)
assert 0 < kept.sum() < 64
print(len(hits))
"""


def _cached(folder, number, torch_name, activation, rate):
    """How many programs a process takes from the cache that computes with these."""
    script = _CACHED
    settings = {"NUMBER": number, "TORCH": torch_name, "ACTIVATION": activation, "RATE": rate}
    for name, value in settings.items():
        script = script.replace(name, str(value))
    return int(run_python(script, JAX_COMPILATION_CACHE_DIR=str(folder)))


FIRST, SECOND = ("sin", "Tanh", 0.5), ("cos", "Sigmoid", 0.25)


@pytest.mark.parametrize("number", [None, 4], ids=["numbers of its own", "colliding numbers"])
def test_the_cache_of_one_process_never_runs_in_another_what_it_ran_there(tmp_path, number):
    """Two processes, one cache on disk, other functions of the same shapes.

    Numbers that start at random keep torch's programs of different processes apart. Where they collide, JAX does load
    the program that the other process compiled, and the number in it stands for this process's function.
    """
    assert _cached(tmp_path, number, *FIRST) == 0
    files = {f.name for f in tmp_path.iterdir()}
    assert any(name.startswith("jit_program") for name in files)
    assert _cached(tmp_path, number, *SECOND) > 0  # JAX's own programs
    grown = {f.name for f in tmp_path.iterdir()} - files
    assert any(name.startswith("jit_program") for name in grown) == (number is None)


# --- forks -------------------------------------------------------------------------------------------

_FORKED = """
import faulthandler
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf

torch.set_num_threads(max(2, torch.get_num_threads()))
model = torchleaf.TorchModule(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()))
CALLS = [(model, x, np.asarray(model(x))) for x in (jnp.ones((2, 64)), jnp.ones((4096, 64)))]


def child(work):
    \"\"\"The exit status of a forked child that does `work`; one that hangs is ended.\"\"\"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's, about threads and forks
        pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        os._exit(0 if work() else 2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_compiled_calls_work_in_a_forked_child():
    """What JAX itself can still do there: calls it has compiled, short ones and long. The parent goes on as before."""
    run_python(
        _FORKED
        + """
for model, x, expected in CALLS:
    for _ in range(2):
        assert child(lambda: np.array_equal(model(x), expected)) == 0
        assert np.array_equal(model(x), expected)
"""
    )


def test_new_programs_in_a_forked_child_are_refused():
    """JAX would hang, compiling on threads that did not survive the fork; torchleaf says so."""
    run_python(
        _FORKED
        + """
def refused():
    try:
        model(x)
    except RuntimeError as error:
        return "fork" in str(error) and "spawn" in str(error)


x = jnp.ones((3, 64))
assert child(refused) == 0
assert model(x).shape == (3, 64)
"""
    )


def test_data_loaders_with_workers():
    """torch's DataLoader forks its workers, after and between torch calls of every length."""
    run_python(
        """
        import warnings
        import jax
        import jax.numpy as jnp
        import numpy as np
        import torch
        import torchleaf

        warnings.filterwarnings("ignore", message=".*fork.*")
        torch.set_num_threads(max(2, torch.get_num_threads()))
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(512, 64))
        loader = torch.utils.data.DataLoader(data, batch_size=256, num_workers=2)
        module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
        model = torchleaf.TorchModule(module)
        step = jax.jit(lambda x: model(x * 1.0) + model(x[:2] * 1.0).sum())
        step(torchleaf.to_jax(data[:256][0]))
        for _ in range(2):
            for (x,) in loader:
                with torch.no_grad():
                    expected = module(x) + module(x[:2]).sum()
                np.testing.assert_allclose(step(torchleaf.to_jax(x)), expected, rtol=1e-3, atol=1e-3)
        """
    )


# --- exits -------------------------------------------------------------------------------------------

_IN_FLIGHT = """
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import torch
import torchleaf
from torch._subclasses.fake_tensor import is_fake

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
started = threading.Event()


def slow(x):
    y = torch.tanh(x @ x)
    if not is_fake(x):
        started.set()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            y = torch.tanh(y @ x)
    return y


function, x = torchleaf.torch_function(slow), jnp.eye(SIZE)
step = jax.jit(lambda x: function(x * 1.0) + 1)
"""

EXITS = {
    "end": (256, "y = step(x)"),
    "several": (8, "ys = [step(x + i) for i in range(3)]"),
    "gradient": (256, "y, pull = jax.vjp(function, x); g = jax.jit(jax.grad(lambda x: function(x * 1.0).sum()))(x)"),
    "thread": (256, "threading.Thread(target=lambda: [step(x) for _ in range(2)]).start()"),
    "sys.exit": (8, "y = step(x); started.wait(); sys.exit(0)"),
}


def _run_in_flight(size, ending):
    script = textwrap.dedent(_IN_FLIGHT.replace("SIZE", str(size))) + ending
    command, environment = [sys.executable, "-W", "error", "-c", script], {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("size", "ending"), EXITS.values(), ids=EXITS)
def test_the_interpreter_exits_with_work_in_flight(size, ending):
    """Short calls and long ones: without a crash, a hang or a word."""
    result = _run_in_flight(size, ending)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_thread_that_outlives_the_main_one_calls_torch_first():
    """Since Python 3.12 no thread starts any more once the main thread has ended."""
    printed = run_python(
        """
        import threading
        import jax
        import jax.numpy as jnp
        import numpy as np
        import torch
        import torchleaf

        def late():
            threading.main_thread().join()
            torch.set_num_threads(2)
            x = jax.random.normal(jax.random.key(0), (256, 256)) / 16
            function = torchleaf.torch_function(lambda x: torch.tanh(x @ x).sum())
            step = jax.jit(jax.value_and_grad(lambda x: function(x * 1.0)))
            expected = jax.value_and_grad(lambda x: jnp.tanh(x @ x).sum())(x)
            for _ in range(4):
                value, gradient = step(x)
                np.testing.assert_allclose(value, expected[0], rtol=1e-3, atol=1e-2)
                np.testing.assert_allclose(gradient, expected[1], rtol=1e-3, atol=1e-3)
            print("as ever", flush=True)

        threading.Thread(target=late).start()
        """
    )
    assert printed == "as ever\n"


def test_an_exception_exits_with_work_in_flight():
    """Its traceback is the last word, its status the usual one."""
    result = _run_in_flight(256, "y = step(x); started.wait()\nraise ValueError('the end')")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("ValueError: the end")


def test_ctrl_c_ends_a_training_script():
    """As it ends any Python script, by KeyboardInterrupt or an error of JAX's that quotes it.

    Pressed again after a while: one that falls into JAX's callback for garbage collection is lost, whatever runs.
    """
    script = _IN_FLIGHT.replace("SIZE", "256") + textwrap.dedent(
        """
        jax.block_until_ready(step(x))
        print("ready", flush=True)
        while True:
            x = jax.block_until_ready(step(x))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    errors = _interrupt(process, attempts=5)
    assert process.returncode in (1, -signal.SIGINT, 128 + signal.SIGINT)
    assert "KeyboardInterrupt" in errors


def _interrupt(process, attempts):
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=10)[1]
    except subprocess.TimeoutExpired:
        if attempts == 1:
            process.kill()
            raise
        return _interrupt(process, attempts - 1)
