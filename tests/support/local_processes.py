"""A program of several processes on this machine, with JAX's own runtime between them (gloo)."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

_PRELUDE = """
import sys
import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, n, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.distributed.initialize(address, n, me, initialization_timeout=60, heartbeat_timeout_seconds=10)
"""


def run_processes(script: str, n: int, devices: int = 1, timeout: float = 180) -> list[tuple[int, str]]:
    """Exit code and output of `n` processes with some CPU devices each that run the indented `script`.

    It knows `n` and `me`, which process it is. Warnings are errors; one that takes longer than `timeout` is ended, and
    its code is None.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-W", "error", "-c", _PRELUDE + textwrap.dedent(script), address, str(n)]
    started = [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(n)
    ]
    return [_ended(process, timeout) for process in started]


def _ended(process: "subprocess.Popen[str]", timeout: float) -> tuple[int | None, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def run_all(script: str, n: int, devices: int = 1) -> None:
    """`run_processes`, all of which have to succeed."""
    for code, output in run_processes(script, n, devices):
        assert code == 0, output
